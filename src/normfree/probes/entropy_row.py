"""Log entries of a training step's attention entropy, and alerts on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normfree.entropy import entropy_bands
from normfree.errors import InputError, unknown_name
from normfree.probes.entropy_probe import EntropyProbe

Row = dict[str, float]

OVERLOADED = "entropy/overloaded_share"
COLLAPSED = "entropy/collapsed_share"
ON_ALERT = ("warn", "stop")


def entropy_row(probes: Sequence[EntropyProbe], *, per_head: bool = True) -> Row:
    """The values that a training step logs, by name; unreadable layers are left out.

    - ``entropy/mean``, ``entropy/L3``, ``entropy/L3H2``: mean entropy of all heads, of a layer's heads, and of a head,
      nats. Layers are the rows of :meth:`EntropyProbe.per_head`, of one probe after the other. NaN if any head is.
    - ``entropy/overloaded_share``, ``entropy/collapsed_share``: shares of heads in the top and lowest quarter of their
      own range, from 0 to the entropy of uniform attention (:meth:`EntropyProbe.normalized`). That bound is the same
      for every step of a run; the bands of ReLU's Revival (section 3, Figure 2a) end at the largest entropy of the
      configurations compared. Heads with NaN are in no band.
    - ``entropy/sink_share``: attention paid to the first key, mean of all heads.
    - ``entropy/nan_scores``, ``entropy/inf_scores``: numbers of NaN and of infinite attention scores.

    Raises:
        InputError: no layer could be read, or the layers of a probe differ in their number of heads.
    """
    layers = dict(_layers_of(probes))
    if not layers:
        reasons = sorted({reason for probe in probes for reason in probe.unreadable.values()})
        raise InputError(f"no attention layer of the model has been read: {'; '.join(reasons)}")
    entropy = torch.cat([layer.entropy for layer in layers.values()])
    bands = entropy_bands(torch.cat([layer.normalized for layer in layers.values()]).clamp(0, 1), maximum=1.0)
    row: Row = {
        "entropy/mean": entropy.mean().item(),
        OVERLOADED: float(bands[3]),
        COLLAPSED: float(bands[0]),
        "entropy/sink_share": torch.cat([layer.sink_share for layer in layers.values()]).mean().item(),
        "entropy/nan_scores": sum(int(layer.nan_scores.sum()) for layer in layers.values()),
        "entropy/inf_scores": sum(int(layer.inf_scores.sum()) for layer in layers.values()),
    }
    for number, layer in layers.items():
        row[f"entropy/L{number}"] = layer.entropy.mean().item()
        if per_head:
            row |= {f"entropy/L{number}H{head}": value for head, value in enumerate(layer.entropy.tolist())}
    return row


class _Layer(NamedTuple):
    """Results of the probe's methods of these names, [n_head] each."""

    entropy: Tensor
    normalized: Tensor
    sink_share: Tensor
    nan_scores: Tensor
    inf_scores: Tensor


def _layers_of(probes: Sequence[EntropyProbe]) -> Iterator[tuple[int, _Layer]]:
    """The layers that were read, with their numbers."""
    first = 0
    for probe in probes:
        unreadable = probe.unreadable
        if len(unreadable) < len(probe.layers):
            results = (probe.per_head(), probe.normalized(), probe.sink_share(), *probe.nonfinite())
            for number, (name, *layer) in enumerate(zip(probe.layers, *results, strict=True), first):
                if name not in unreadable:
                    yield number, _Layer(*layer)
        first += len(probe.layers)


@dataclass
class Alerts:
    """Thresholds of the shares of collapsed and of overloaded heads; None is no alert.

    Raises:
        InputError: a threshold that is no share, or an unknown ``on_alert``.
    """

    alert_collapsed: float | None = None
    alert_overloaded: float | None = None
    on_alert: Literal["warn", "stop"] = "warn"
    _raised: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        for name in ("alert_collapsed", "alert_overloaded"):
            threshold = getattr(self, name)
            if threshold is not None and not 0 <= threshold < 1:
                raise InputError(f"{name} is a share of the heads, at least 0 and below 1, got {threshold}")
        if self.on_alert not in ON_ALERT:
            raise unknown_name("on_alert", self.on_alert, ON_ALERT)

    def of(self, row: Row, step: int) -> list[str]:
        """Messages for the shares that ``row`` is the first to have above their thresholds."""
        said = []
        for name, what, threshold in (
            (COLLAPSED, "collapsed: entropy below a quarter", self.alert_collapsed),
            (OVERLOADED, "overloaded: entropy above three quarters", self.alert_overloaded),
        ):
            is_above = threshold is not None and row.get(name, 0.0) > threshold
            if is_above and name not in self._raised:
                assert threshold is not None
                said.append(
                    f"step {step}: {100 * row[name]:.1f} % of the attention heads are {what} of the entropy of uniform "
                    f"attention (threshold {100 * threshold:.1f} %)"
                )
            (self._raised.add if is_above else self._raised.discard)(name)
        return said
