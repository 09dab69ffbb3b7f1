"""Attention entropy in any training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self

from torch import nn

from normfree.errors import InputError
from normfree.probes.entropy_row import Row
from normfree.probes.probed_steps import ProbesEntropy


class EntropyMonitor(ProbesEntropy):
    """The attention entropy of every ``every``-th training step, in any training loop. ::

        monitor = EntropyMonitor(model, every=100)
        for step, batch in enumerate(batches):
            with monitor.step(step) as row:
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if row:
                tracker.log(row, step=step)

    Values (:func:`normfree.probes.entropy_row.entropy_row`): ``entropy/mean``, ``entropy/L3``, ``entropy/L3H2`` (nats),
    ``entropy/overloaded_share``, ``entropy/collapsed_share``, ``entropy/sink_share``, ``entropy/nan_scores`` and
    ``entropy/inf_scores``. Only forward passes that compute gradients count: not recomputation under gradient
    checkpointing, evaluation or generation. Losses, gradients and random numbers stay the same, bit for bit; code
    compiled by ``torch.compile`` runs uncompiled in probed steps.

    Collective under torch.distributed (DDP, FSDP, accelerate): enter ``step`` from every rank; all get the same row.

    Args:
        model: any module that contains a transformers model, wrapped (DDP, PEFT) or not.
        every: steps whose number is a multiple of it are probed.
        per_head: give every head's entropy, not only each layer's mean.
        alert_collapsed, alert_overloaded: warn when ``entropy/collapsed_share`` or ``entropy/overloaded_share`` rises
            above this share of the heads.
        on_alert: "warn", or "stop", which also sets ``should_stop``.

    Raises:
        InputError: a value of an argument that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        per_head: bool = True,
        alert_collapsed: float | None = None,
        alert_overloaded: float | None = None,
        on_alert: Literal["warn", "stop"] = "warn",
    ) -> None:
        super().__init__(
            every,
            per_head=per_head,
            alert_collapsed=alert_collapsed,
            alert_overloaded=alert_overloaded,
            on_alert=on_alert,
        )
        self._model: nn.Module | None = model

    @contextmanager
    def step(self, step: int) -> Iterator[Row]:
        """Context of everything that step number ``step`` computes, all its micro-batches included.

        Yields:
            a dict, empty inside; after the block of a probed step it holds the values by name.

        Raises:
            InputError: the monitor is closed, or already inside a step.
        """
        if self._model is None:
            raise InputError("this EntropyMonitor is closed; make a new one")
        if self._steps.is_active:
            raise InputError("this EntropyMonitor is already inside of a step; leave it first")
        row: Row = {}
        if step % self.every != 0:
            yield row
            return
        self._steps.begin(self._model, step)
        try:
            yield row
        except BaseException:
            self._steps.abandon()
            raise
        row |= self._steps.finish()

    @property
    def should_stop(self) -> bool:
        """True once an alert was raised, with ``on_alert="stop"``."""
        return self._steps.should_stop

    def close(self) -> None:
        """Releases the model."""
        self._steps.abandon()
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        model = "closed" if self._model is None else type(self._model).__name__
        return f"EntropyMonitor({model}, every={self.every}, {self._steps})"
