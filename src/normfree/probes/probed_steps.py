"""Probed training steps of somebody else's training; errors become warnings."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Literal

import torch
from torch import nn

from normfree.errors import InputError
from normfree.probes.entropy_probe import EntropyProbe
from normfree.probes.entropy_row import Alerts, Row, entropy_row
from normfree.probes.training_step import probe_training_step

N_NAMED = 3
"""Most layers that a warning names."""


class ProbedSteps:
    """Measures the training step between ``begin`` and ``finish``. Collective: in every process, or in none.

    Exceptions of the measurement never reach the training; the main process warns of each once. Nothing of the model is
    held between steps.
    """

    def __init__(self, *, per_head: bool, alerts: Alerts) -> None:
        self.per_head = per_head
        self.alerts = alerts
        self.last: tuple[int, Row] | None = None
        """The latest step measured, and its row."""
        self.layers: tuple[str, ...] = ()
        """Names of the attention modules, as of the latest step measured."""
        self._step = 0
        self._probes: dict[str, EntropyProbe] = {}
        self._parts: tuple[str, ...] = ("",)
        """Modules that get a probe each: the model, or its attentions if they differ in heads."""
        self._active = ExitStack()
        self._alerted = False
        self._warned: set[str] = set()

    @property
    def is_active(self) -> bool:
        return bool(self._probes)

    @property
    def should_stop(self) -> bool:
        """True once an alert that stops has been raised."""
        return self._alerted and self.alerts.on_alert == "stop"

    def begin(self, model: nn.Module, step: int, *, is_compiled: bool = False) -> None:
        self.abandon()
        try:
            self._probes = self._active.enter_context(probe_training_step(model, self._parts, is_compiled=is_compiled))
            self._step = step
        except Exception as error:
            self.refuse(_reason(error))

    def refuse(self, reason: str) -> None:
        """Warns, once, that steps are not measured."""
        self._warn_once(f"attention entropy cannot be logged: {reason}")

    def finish(self) -> Row:
        """The row of the step, reduced over all processes; empty if nothing could be read."""
        probes = self._probes
        self.abandon()
        if not probes:
            return {}
        row: Row = {}
        try:
            for probe in probes.values():
                probe.reduce()
            self.layers = tuple(f"{part}{name}" for part, probe in probes.items() for name in probe.layers)
            if not self._takes_apart(probes):
                row = entropy_row(list(probes.values()), per_head=self.per_head)
                self._warn_of_unreadable(probes)
        except Exception as error:
            self.refuse(_reason(error))
        self.last = (self._step, row)
        for alert in self.alerts.of(row, self._step):
            self._alerted = True
            self._warn(alert + ("; the run stops" if self.should_stop else ""))
        return row

    def abandon(self) -> None:
        """Stops measuring and forgets the step. Safe to call at any time."""
        self._active.close()
        self._probes = {}

    def __str__(self) -> str:
        if self.last is None:
            return "no step probed yet"
        step, row = self.last
        return f"step {step}: " + (f"mean {row['entropy/mean']:.3g} nats" if row else "nothing read")

    def _takes_apart(self, probes: dict[str, EntropyProbe]) -> bool:
        """True if the layers that one probe has read differ in heads, and so have no common table.

        From then on each has its own probe; the first probed step, which found out, is lost.
        """
        probe = probes.get("")
        if probe is None or len(probe.unreadable) == len(probe.layers):
            return False
        try:
            probe.rows()
        except InputError as reason:
            self._parts = tuple(dict.fromkeys(name.split(" (call ")[0] for name in probe.layers))
            self._warn_once(f"attention entropy is logged from the next probed step on, layer by layer: {reason}")
            return True
        return False

    def _warn_of_unreadable(self, probes: dict[str, EntropyProbe]) -> None:
        names_by_reason: dict[str, list[str]] = {}
        for part, probe in probes.items():
            for name, reason in probe.unreadable.items():
                names_by_reason.setdefault(reason, []).append(f"{part}{name}")
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


class ProbesEntropy:
    """The options of both EntropyCallbacks: every ``every``-th optimizer step is measured.

    Raises:
        InputError: a value of an argument that is not allowed.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        per_head: bool = True,
        alert_collapsed: float | None = None,
        alert_overloaded: float | None = None,
        on_alert: Literal["warn", "stop"] = "warn",
    ) -> None:
        self.every = check_every(every)
        self._steps = ProbedSteps(per_head=per_head, alerts=Alerts(alert_collapsed, alert_overloaded, on_alert))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the attention modules: ``entropy/L3`` is of ``layers[3]``. Empty before the first probed step."""
        return self._steps.layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}(every={self.every}, {self._steps})"


def check_every(every: int) -> int:
    """Raises:
    InputError: ``every`` is no positive whole number.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"every is a number of optimizer steps, a whole number from 1 on, got {every!r}")
    return every


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
