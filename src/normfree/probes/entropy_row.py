"""What is logged of the attention entropy of a training step, and when it is worth an alert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from normfree.entropy import entropy_bands
from normfree.errors import InputError, unknown_name
from normfree.probes.attention_entropy import EntropyProbe

Row = dict[str, float]

OVERLOADED = "entropy/overloaded_share"
COLLAPSED = "entropy/collapsed_share"
ON_ALERT = ("warn", "stop")


def entropy_row(probe: EntropyProbe, *, per_head: bool = True) -> Row:
    """The values that a training step logs, by name; layers that could not be read are left out.

    - ``entropy/mean``, ``entropy/L3``, ``entropy/L3H2``: the mean of all heads, of a layer's heads, and a head's
      entropy, nats. Layers are the rows of :meth:`EntropyProbe.per_head`. NaN if any head in them is.
    - ``entropy/overloaded_share``, ``entropy/collapsed_share``: the shares of heads in the top and in the lowest
      quarter of their own range, from 0 to the entropy of uniform attention (:meth:`EntropyProbe.normalized`). The
      bands of ReLU's Revival (section 3, Figure 2a) end at the largest entropy of the configurations compared; within
      one run the uniform bound is the same for every step. Heads with NaN are in no band.
    - ``entropy/sink_share``: mean attention paid to the first key, mean of all heads.
    - ``entropy/nan_scores``, ``entropy/inf_scores``: numbers of NaN and of infinite attention scores.

    Raises:
        InputError: no layer could be read, or layers differ in their number of heads.
    """
    unreadable = probe.unreadable
    layers = [layer for layer, name in enumerate(probe.layers) if name not in unreadable]
    entropy = probe.per_head()[layers]
    bands = entropy_bands(probe.normalized()[layers].clamp(0, 1), maximum=1.0)
    nan_scores, inf_scores = probe.nonfinite()
    row: Row = {
        "entropy/mean": entropy.mean().item(),
        OVERLOADED: float(bands[3]),
        COLLAPSED: float(bands[0]),
        "entropy/sink_share": probe.sink_share()[layers].mean().item(),
        "entropy/nan_scores": int(nan_scores.sum()),
        "entropy/inf_scores": int(inf_scores.sum()),
    }
    for layer, heads in zip(layers, entropy, strict=True):
        row[f"entropy/L{layer}"] = heads.mean().item()
        if per_head:
            row |= {f"entropy/L{layer}H{head}": value for head, value in enumerate(heads.tolist())}
    return row


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
        """What to say of the shares that ``row`` is the first to have above their thresholds."""
        said = []
        for name, what, threshold in (
            (COLLAPSED, "collapsed: entropy below a quarter", self.alert_collapsed),
            (OVERLOADED, "overloaded: entropy above three quarters", self.alert_overloaded),
        ):
            is_above = threshold is not None and row.get(name, 0.0) > threshold
            if is_above and name not in self._raised:
                said.append(
                    f"step {step}: {row[name]:.1%} of the attention heads are {what} of the entropy of uniform "
                    f"attention (threshold {threshold:.1%})"
                )
            (self._raised.add if is_above else self._raised.discard)(name)
        return said
