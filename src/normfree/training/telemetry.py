"""Measurements during training, on training steps only, from the forward passes of training itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from normfree.columns import TOKENS_PER_SECOND
from normfree.modeling import NormfreeForCausalLM
from normfree.probes import EntropyProbe
from normfree.probes.learned_slopes import LearnedSlopeProbe
from normfree.probes.optional import optional_probe
from normfree.probes.probe import LayerRow, Probe, WeightProbe, rows_by_head
from normfree.probes.residual_stream import ResidualStreamProbe
from normfree.probes.sparsity_probe import SparsityProbe
from normfree.training.objectives import Objective
from normfree.training.records import RunRecords


def recorded_probes(
    model: NormfreeForCausalLM, objective: Objective | None = None, names: Iterable[str] = ()
) -> list[Probe]:
    """The probes that every run records, in the order of their rows in ``layers.parquet``, then those of ``names``.

    Raises:
        InputError: there is no probe of a name (see :mod:`normfree.probes.optional`).
    """
    return [
        EntropyProbe(model, count_nonfinite=True),
        ResidualStreamProbe(model),
        SparsityProbe(model),
        LearnedSlopeProbe(model),
        *([] if objective is None else [ObjectiveProbe(objective)]),
        *(optional_probe(name, model) for name in names),
    ]


class ObjectiveProbe(WeightProbe):
    """The values that an objective learns for each head."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._objective = objective

    def read(self) -> Iterator[LayerRow]:
        for name, table in self._objective.head_values().items():
            yield from rows_by_head(name, table)


class Telemetry:
    """Records what training logs and, every ``every`` steps, the rows of ``probes``.

    A row of step s in ``layers.parquet`` describes the weights after s updates, read on the batch of the next
    training step: all its micro-batches, all processes. What needs no batch (:class:`WeightProbe`) is recorded of the
    final weights too. The calls of a run, from every rank::

        telemetry.begin(step)  # updates so far: 0, or those of the checkpoint it resumes from
        for step in range(step, steps):
            telemetry.begin_step(step)
            ...  # forward and backward passes, update
            telemetry.end_step()
            telemetry.log(step + 1, {"train_loss": ...} | telemetry.speed())
        telemetry.finish(steps)

    Always call ``close`` in the end; ``records`` are flushed before each checkpoint.

    Args:
        every: steps between two whose forward passes are read.
    """

    def __init__(
        self,
        records: RunRecords,
        probes: Sequence[Probe],
        *,
        every: int,
        tokens_per_step: int,
    ) -> None:
        self.records = records
        self._probes = probes
        self._every = every
        self._tokens_per_step = tokens_per_step
        self._attached = ExitStack()
        self._measured_step: int | None = None
        self._wall_seconds_before = 0.0
        self._start = 0.0
        self._step_start = 0.0
        self._seconds_in_steps = 0.0
        self._steps_timed = 0

    def begin(self, step: int) -> None:
        """Training begins, or resumes, at ``step``: later rows are dropped, to be measured again."""
        self.records.rewind(step)
        self._wall_seconds_before = self.records.wall_seconds
        self._start = time.monotonic()

    def begin_step(self, step: int) -> None:
        """Attaches the probes if the step from ``step`` to ``step`` + 1 is measured; code runs uncompiled then."""
        self._step_start = time.monotonic()
        if step % self._every == 0:
            with ExitStack() as stack:
                # a compiled step would not run the probes' Python code
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for probe in self._probes:
                    probe.reset()
                    stack.enter_context(probe)
                self._attached = stack.pop_all()
            self._measured_step = step

    def end_step(self) -> None:
        """Adds the rows of a measured step. Collective: call it from every rank."""
        self._seconds_in_steps += time.monotonic() - self._step_start
        self._steps_timed += 1
        step = self._measured_step
        self.close()
        if step is not None:
            for probe in self._probes:
                probe.reduce()
            for probe in self._probes:
                self._add_rows(step, probe.layer_rows())

    def speed(self) -> dict[str, float]:
        """``tokens_per_second`` in the steps since the last call, if there were any."""
        if not self._steps_timed:
            return {}
        speed = self._steps_timed * self._tokens_per_step / self._seconds_in_steps
        self._seconds_in_steps, self._steps_timed = 0.0, 0
        return {TOKENS_PER_SECOND: speed}

    def log(self, step: int, entries: Mapping[str, float]) -> None:
        """Adds a row of ``metrics.parquet`` for each of ``entries``, read after ``step`` updates."""
        wall_seconds = self._wall_seconds_before + time.monotonic() - self._start
        for name, value in entries.items():
            self.records.add_metric(step, step * self._tokens_per_step, wall_seconds, name, value)

    def finish(self, step: int) -> None:
        """Adds what probes read of the final weights, and writes everything. Collective: call it from every rank."""
        for probe in self._probes:
            if isinstance(probe, WeightProbe):
                self._add_rows(step, probe.read())
        self.records.flush()

    def close(self) -> None:
        """Detaches the probes. Safe to call at any time."""
        self._attached.close()
        self._measured_step = None

    def _add_rows(self, step: int, rows: Iterator[LayerRow]) -> None:
        for row in rows:
            self.records.add_layer(step, *row)
