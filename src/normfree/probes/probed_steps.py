"""Single training steps of a model, measured one after the other; what goes wrong becomes a warning."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from torch import nn

from normfree.errors import InputError
from normfree.probes.attention_entropy import EntropyProbe
from normfree.probes.entropy_row import Alerts, Row, entropy_row
from normfree.probes.training_step import probe_training_step

N_NAMED = 3
"""Layers that a warning names at most."""


class ProbedSteps:
    """Between ``begin`` and ``finish`` the training step is measured; in all processes, or in none.

    No exception of the measurement reaches the training: it is warned of, once, by the main process. Nothing of the
    model is held between steps.
    """

    def __init__(self, *, per_head: bool, alerts: Alerts) -> None:
        self.per_head = per_head
        self.alerts = alerts
        self.last: tuple[int, Row] | None = None
        """The latest step measured, and its row."""
        self.layers: tuple[str, ...] = ()
        """Names of the attention modules, as of the latest step measured."""
        self._step = 0
        self._probe: EntropyProbe | None = None
        self._active = ExitStack()
        self._alerted = False
        self._warned: set[str] = set()

    @property
    def is_active(self) -> bool:
        return self._probe is not None

    @property
    def should_stop(self) -> bool:
        """True once an alert that stops has been raised."""
        return self._alerted and self.alerts.on_alert == "stop"

    def begin(self, model: nn.Module, step: int, *, is_compiled: bool = False) -> None:
        self.abandon()
        try:
            self._probe = self._active.enter_context(probe_training_step(model, is_compiled=is_compiled))
            self._step = step
        except Exception as error:
            self.refuse(_reason(error))

    def refuse(self, reason: str) -> None:
        """Warn, once, that steps are not measured."""
        self._warn_once(f"attention entropy cannot be logged: {reason}")

    def finish(self) -> Row:
        """The row of the step, reduced over all processes; empty if nothing could be read."""
        probe = self._probe
        self.abandon()
        if probe is None:
            return {}
        row: Row = {}
        try:
            probe.reduce()
            self.layers = probe.layers
            self._warn_of_unreadable(probe)
            row = entropy_row(probe, per_head=self.per_head)
        except Exception as error:
            self.refuse(_reason(error))
        self.last = (self._step, row)
        for alert in self.alerts.of(row, self._step):
            self._alerted = True
            self._warn(alert + ("; the run stops" if self.should_stop else ""))
        return row

    def abandon(self) -> None:
        """Stop measuring and forget the step; safe to call at any time."""
        self._active.close()
        self._probe = None

    def __str__(self) -> str:
        if self.last is None:
            return "no step probed yet"
        step, row = self.last
        return f"step {step}: " + (f"mean {row['entropy/mean']:.3g} nats" if row else "nothing read")

    def _warn_of_unreadable(self, probe: EntropyProbe) -> None:
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in probe.unreadable.items():
            names_by_reason.setdefault(reason, []).append(name)
        if len(probe.unreadable) == len(probe.layers):
            return  # said by the row, which there is none of
        for reason, names in names_by_reason.items():
            more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
            self._warn_once(f"attention entropy is not logged for {', '.join(names[:N_NAMED])}{more}: {reason}")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._warn(message)

    def _warn(self, message: str) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            warnings.warn(message, stacklevel=2)


def check_every(every: int) -> int:
    """Raises:
    InputError: ``every`` is no positive whole number.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"every is a number of optimizer steps, a whole number from 1 on, got {every!r}")
    return every


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
