"""Fine-tuning that removes norms by a schedule, with an auxiliary loss and a check for divergence."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.removal.distillation import Distilled
from normfree.removal.layout import COSTS_FILE, REMOVAL_FILE
from normfree.removal.midway import Midway
from normfree.removal.order import measured_order, norm_costs
from normfree.removal.schedule import Removal, RemovalSchedule, part_name
from normfree.removal.std_losses import StdLosses
from normfree.training import Callback, RunConfig, RunResult, RunState, load_pretrained, train
from normfree.training.objectives import CROSS_ENTROPY, Objective
from normfree.training.run_folder import checkpoints, last_checkpoint, step_of

log = logging.getLogger(__name__)

MAX_JUMP = 1.0
"""A removal has diverged if the loss stays more than this many nats above the loss before the first removal ..."""
JUMP_STEPS = 5
"""... for so many steps: without norms, one batch with a very long token may raise the loss."""
BASELINE_STEPS = 10
STRETCH, LEAST_STRETCH = 2.0, 1.2
"""A stretched schedule that does not fit the budget is stretched less, but no less than this."""
MAX_STRETCHES = 3


class DivergedError(Exception):
    """Training diverged after ``removal``, or before any."""

    def __init__(self, removal: Removal | None, what: str) -> None:
        place = "before any removal" if removal is None else f"after the removal of {part_name(*removal[1:])}"
        super().__init__(f"{what} {place}")
        self.removal = removal


class RemovalDivergedError(InputError):
    """The removal diverged too often, or its stretched schedule no longer fits the budget."""


class RemoveNorms(Callback):
    """Removes norms at the steps of ``removals``.

    Args:
        measure_order: called when the first norm is about to go; returns the removals in the order that it measured.

    Raises:
        DivergedError: the loss jumps after a removal, or it or a std before a norm is not finite.
    """

    def __init__(
        self, midway: Midway, removals: list[Removal], measure_order: Callable[[], list[Removal]] | None = None
    ) -> None:
        self.midway = midway
        self.removals = removals
        self._measure_order = measure_order
        self.last_step = midway.schedule.end_of(removals)
        self._before: deque[float] = deque(maxlen=BASELINE_STEPS)
        self._high: list[DivergedError] = []

    def resume(self, run: RunState) -> None:
        """Matches the model's tensors to a checkpoint from after the last removal."""
        if self.last_step < run.step:
            self.midway.forget_special_tokens()

    def begin(self, run: RunState) -> None:
        """Repeats the removals before the checkpoint that the run resumes from, and reads the recorded losses."""
        if self._measure_order is not None and run.step > self.removals[0].step:
            raise InputError(f"{COSTS_FILE} is missing, which says what was removed; begin again in another folder")
        if run.step:
            self._remove(run.step - 1)
        for step, loss in run.records.metric(CROSS_ENTROPY):
            self._watch(step, loss)

    def begin_step(self, run: RunState) -> None:
        if self._measure_order is not None and run.step == self.removals[0].step:
            self.removals = self._measure_order()
        self._remove(run.step)

    def end_step(self, run: RunState) -> None:
        where = self.midway.overflow()
        if where is not None:
            raise DivergedError(self._gone(run.step), f"a std that is not finite before {where} at step {run.step}")

    def log(self, run: RunState, entries: Mapping[str, float]) -> None:
        if CROSS_ENTROPY in entries:
            self._watch(run.step, entries[CROSS_ENTROPY])

    def finish(self, run: RunState) -> None:
        """Raises for a jump with no steps left to recover in; a run stopped earlier can still resume."""
        if self._high and run.step >= run.n_steps:
            raise self._high[0]

    def _gone(self, step: int) -> Removal | None:
        """The last removal before the end of step ``step``, counted from 1."""
        return next((each for each in reversed(self.removals) if each.step < step), None)

    def _watch(self, step: int, loss: float) -> None:
        """Checks the loss of step ``step``, counted from 1."""
        last = self._gone(step)
        if last is None:
            if not math.isfinite(loss):
                raise DivergedError(None, f"a loss of {loss} at step {step}")
            self._before.append(loss)
            return
        baseline = sum(self._before) / len(self._before) if self._before else math.nan
        if loss <= baseline + MAX_JUMP:
            self._high.clear()
            return
        self._high.append(DivergedError(last, f"a loss of {loss:.3f} nats, from {baseline:.3f},"))
        if not math.isfinite(loss) or math.isnan(baseline) or len(self._high) == JUMP_STEPS:
            raise self._high[0]

    def _remove(self, step: int) -> None:
        """Removes what the schedule removes up to ``step``."""
        for removal in self.removals[len(self.midway.gone) :]:
            if removal.step <= step:
                self.midway.apply(removal)
        self.midway.begin_step(step)
        if step >= self.last_step:
            self.midway.finish()


def remove_by_finetuning(
    run: RunConfig,
    data: PackedData,
    folder: Path,
    schedule: RemovalSchedule,
    model: NormfreeConfig,
    *,
    callbacks: tuple[Callback, ...] = (),
) -> RunResult:
    """Trains ``run``, which starts from a model of configuration ``model``, while ``schedule`` removes its norms.

    The last checkpoint in ``folder`` is a model whose norms have constant stds. If the loss rises by more than
    ``MAX_JUMP`` nats after a removal and stays there for ``JUMP_STEPS`` steps or to the end, or it or a std is not
    finite, the run returns to its last checkpoint before that removal, and before those whose ramps were not over, and
    stretches the waits for later ones by ``STRETCH``, or as far as the budget goes, at most ``MAX_STRETCHES`` times.
    ``removal.json`` records the stretches, with which a stopped run resumes, and at the end, good or bad, all removals:
    step, part, layer. An order by measurement is measured once, before the first norm goes, and kept in
    ``norm-costs.csv``.

    Raises:
        RemovalDivergedError: the removal diverged too often.
        InputError: the schedule does not fit the model or the budget.
    """
    stretches, n_step = _stretches(folder), run.recipe.n_steps(run.data.sequence_length)
    while True:
        current = _resolved(schedule, stretches, folder, model)
        try:
            check_fit(run, current, model)
        except InputError as error:
            raise (RemovalDivergedError(f"after a jump of the loss {error}") if stretches else error) from error
        try:
            result = _train(run, data, folder, current, model, callbacks)
        except DivergedError as jump:
            _record(folder, stretches, schedule, model)
            if jump.removal is None:
                raise RemovalDivergedError(
                    f"training diverged: {jump}; lower recipe.learning_rate, or the weights of the schedule's losses"
                ) from jump
            if len(stretches) == MAX_STRETCHES:
                raise RemovalDivergedError(
                    f"the removal diverged {MAX_STRETCHES + 1} times, at last with {jump}; give more steps, a lower "
                    "learning rate, or another schedule"
                ) from jump
            ramp = current.ramp_of(jump.removal.part)
            step = _go_back(folder, max(0, jump.removal.step - ramp), jump.removal.step)
            factor = _stretch(current.last_step(model) - step, n_step - 2 - step)
            stretches.append({"step": step, "factor": factor, "jump": str(jump)})
            _record(folder, stretches, schedule, model)
            log.warning("diverged: %s; back to step %d, later waits are stretched by %.3g", jump, step, factor)
        else:
            _record(folder, stretches, schedule, model)
            return result


def check_fit(run: RunConfig, schedule: RemovalSchedule, model: NormfreeConfig) -> None:
    """Checks that ``run`` can follow ``schedule`` with that model.

    Raises:
        InputError: the schedule does not fit the model, a norm goes before a step has been taken, the budget has no
            step after the last removal and its ramp, the loss is not logged at every step, or blocks are computed twice
            while a loss reads their stds.
    """
    if run.recipe.logging_steps != 1:
        raise InputError(
            f"a removal checks the loss of every step; set recipe.logging_steps to 1, not {run.recipe.logging_steps}"
        )
    reads_blocks = schedule.massive_weight or (schedule.std_loss_weight and schedule.std_loss_norms == "all")
    if run.recipe.gradient_checkpointing and reads_blocks:
        raise InputError(
            "recipe.gradient_checkpointing keeps no stds inside blocks, which std_loss_norms all and massive_weight "
            "read; leave it out, or them"
        )
    removals, n_step = schedule.removals(model), run.recipe.n_steps(run.data.sequence_length)
    first, last = removals[0], removals[-1]
    if first.step < 1:
        raise InputError(f"the schedule removes {part_name(*first[1:])} before the first step; begin after step 0")
    if schedule.last_step(model) >= n_step:
        n_ramp = schedule.ramp_of(last.part)
        ramp = f" with a ramp of {n_ramp} steps" if n_ramp > 1 else ""
        raise InputError(
            f"the schedule's last removal ({last.part}) is at step {last.step}{ramp}, and the budget ends after "
            f"{n_step} steps; give more tokens or steps, or a shorter schedule"
        )


def constant_std_model(folder: Path) -> NormfreeForCausalLM:
    """The model of the finished removal in ``folder``; its norms divide by constants."""
    return load_pretrained(str(folder)).as_normfree()


def _train(
    run: RunConfig,
    data: PackedData,
    folder: Path,
    schedule: RemovalSchedule,
    model: NormfreeConfig,
    callbacks: tuple[Callback, ...],
) -> RunResult:
    def intervene(to_change: NormfreeForCausalLM) -> tuple[Objective, Callback]:
        midway = Midway(to_change, schedule)
        objective: Objective = StdLosses(midway)
        if schedule.distillation_weight:
            assert run.start_from is not None, "a removal starts from a model"
            objective = Distilled(objective, run.start_from, data, schedule.distillation_weight)
        removals = schedule.removals(model)

        def measure_order() -> list[Removal]:
            costs = norm_costs(midway, removals, data.train, run.recipe.precision)
            write_text(folder / COSTS_FILE, costs.to_csv(index=False, na_rep="nan"))
            return schedule.reordered(model, measured_order(costs)).removals(model)

        return objective, RemoveNorms(midway, removals, measure_order if schedule.order == "auto" else None)

    return train(run, data, folder, callbacks=callbacks, intervene=intervene)


def _stretch(needed: int, left: int) -> float:
    """``STRETCH``, or as much as the budget allows: ``left`` steps for what takes ``needed``."""
    return max(LEAST_STRETCH, min(STRETCH, left / max(needed, 1)))


def _resolved(
    schedule: RemovalSchedule, stretches: Iterable[Mapping[str, Any]], folder: Path, model: NormfreeConfig
) -> RemovalSchedule:
    """``schedule`` as the removal in ``folder`` follows it: stretched, and in the order that it measured."""
    for each in stretches:
        schedule = schedule.stretched(model, each["step"], each["factor"])
    path = folder / COSTS_FILE
    if schedule.order != "auto" or not path.exists():
        return schedule
    return schedule.reordered(model, measured_order(pd.read_csv(path)))


def _stretches(folder: Path) -> list[dict[str, Any]]:
    path = folder / REMOVAL_FILE
    return json.loads(path.read_text(encoding="utf-8"))["stretches"] if path.exists() else []


def _record(folder: Path, stretches: list[dict[str, Any]], schedule: RemovalSchedule, model: NormfreeConfig) -> None:
    removals = [each._asdict() for each in _resolved(schedule, stretches, folder, model).removals(model)]
    write_text(folder / REMOVAL_FILE, json.dumps({"stretches": stretches, "removals": removals}, indent=2))


def recorded_removals(folder: Path) -> list[Removal]:
    """What went when, or was to go, in the removal in ``folder``, which has ended."""
    content = json.loads((folder / REMOVAL_FILE).read_text(encoding="utf-8"))
    return [Removal(**each) for each in content["removals"]]


def _go_back(folder: Path, wanted: int, latest: int) -> int:
    """Deletes the checkpoints after ``wanted``, or, if that would leave none, after ``latest``.

    Returns the step that the run resumes from, 0 for its beginning.
    """
    steps = [step_of(each) for each in checkpoints(folder)]
    bound = wanted if any(step <= wanted for step in steps) else latest
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) > bound:
            shutil.rmtree(checkpoint)
    left = last_checkpoint(folder)
    return step_of(left) if left is not None else 0
