"""Fine-tuning that removes norms by a schedule, with an auxiliary loss and a check for divergence."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.removal.distillation import Distilled
from normfree.removal.midway import Midway
from normfree.removal.removable import RemovableNorm
from normfree.removal.schedule import Removal, RemovalSchedule
from normfree.training import Callback, RunConfig, RunResult, RunState, load_pretrained, train
from normfree.training.objectives import CROSS_ENTROPY, Lesson, Objective, Term
from normfree.training.run_folder import last_checkpoint

log = logging.getLogger(__name__)

STD_LOSS = "residual_std_mismatch"
REMOVAL_FILE = "removal.json"
MAX_JUMP = 1.0
"""A removal has diverged if the loss stays more than this many nats above the loss before the first removal ..."""
JUMP_STEPS = 5
"""... for so many steps: without norms, one batch with a very long token may raise the loss."""
BASELINE_STEPS = 10
STRETCH = 2.0
MAX_STRETCHES = 3


class StdLoss(Objective):
    """cross-entropy + ``weight`` · mean over tokens of (s - m)², or plain cross-entropy with a weight of 0.

    s is the std of a token before the final norm; m, held constant, is the mean of s over the tokens that the constant
    std averages (see :class:`~normfree.removal.removable.SpecialTokens`). It draws all tokens to one std before that
    becomes a constant ("Transformers Don't Need LayerNorm at Inference Time", Section 3).
    """

    reads_entropy = False

    def __init__(self, midway: Midway, weight: float) -> None:
        super().__init__()
        self.midway = midway
        self.weight = weight
        final = midway.model.model.final_norm
        self.final = final if weight and isinstance(final, RemovableNorm) else None
        if weight and self.final is None:
            raise InputError("std_loss_weight needs a final norm, which the model does not have; set it to 0")
        if self.final is not None:
            self.final.keeps_own_std = True

    def terms(self, entropy: Tensor | None, lesson: Lesson | None) -> dict[str, Term]:
        if self.final is None:
            return {}
        own_std, left_out = self.final.own_std, self.midway.tokens.left_out
        assert own_std is not None, "the forward pass has been through the final norm"
        ordinary = torch.ones_like(own_std, dtype=torch.bool) if left_out is None else ~left_out
        mean = (own_std.detach() * ordinary).sum() / ordinary.sum().clamp_min(1)
        return {STD_LOSS: Term((own_std - mean).square().mean(), self.weight)}


class DivergedError(Exception):
    """Training diverged after ``removal``."""

    def __init__(self, removal: Removal, what: str) -> None:
        place = removal.part if removal.layer is None else f"{removal.part} of layer {removal.layer}"
        super().__init__(f"{what} after the removal of {place}")
        self.removal = removal


class RemovalDivergedError(InputError):
    """The removal diverged too often, or its stretched schedule no longer fits the budget."""


class RemoveNorms(Callback):
    """Removes norms at the steps of ``removals``, and raises :class:`DivergedError` if the loss jumps after one."""

    def __init__(self, midway: Midway, removals: list[Removal]) -> None:
        self.midway = midway
        self.removals = removals
        self._before: deque[float] = deque(maxlen=BASELINE_STEPS)
        self._high: list[DivergedError] = []

    def resume(self, run: RunState) -> None:
        """Matches the model's tensors to a checkpoint from after the last removal."""
        if all(each.step < run.step for each in self.removals):
            self.midway.forget_special_tokens()

    def begin(self, run: RunState) -> None:
        """Repeats the removals before the checkpoint that the run resumes from, and reads the recorded losses."""
        self._remove(each for each in self.removals if each.step < run.step)
        for step, loss in run.records.metric(CROSS_ENTROPY):
            self._watch(step, loss)

    def begin_step(self, run: RunState) -> None:
        self._remove(each for each in self.removals if each.step == run.step)

    def log(self, run: RunState, entries: Mapping[str, float]) -> None:
        if CROSS_ENTROPY in entries:
            self._watch(run.step, entries[CROSS_ENTROPY])

    def finish(self, run: RunState) -> None:
        """Raises for a jump with no steps left to recover in; a run stopped earlier can still resume."""
        if self._high and run.step >= run.n_steps:
            raise self._high[0]

    def _watch(self, step: int, loss: float) -> None:
        """Checks the loss of step ``step``, counted from 1."""
        gone = [each for each in self.removals if each.step < step]
        if not gone:
            self._before.append(loss)
            return
        baseline = sum(self._before) / len(self._before) if self._before else math.nan
        if loss <= baseline + MAX_JUMP:
            self._high.clear()
            return
        self._high.append(DivergedError(gone[-1], f"a loss of {loss:.3f} nats, from {baseline:.3f},"))
        if not math.isfinite(loss) or math.isnan(baseline) or len(self._high) == JUMP_STEPS:
            raise self._high[0]

    def _remove(self, removals: Iterable[Removal]) -> None:
        for removal in removals:
            if self.midway.gone and not self.midway.has_finite_std(removal):
                raise DivergedError(self.midway.gone[-1], "stds that are not finite")
            self.midway.apply(removal)
        if all(each in self.midway.gone for each in self.removals):
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
    ``MAX_JUMP`` nats after a removal and stays there for ``JUMP_STEPS`` steps or to the end, or is NaN, the run returns
    to its last checkpoint before that removal and stretches the waits for later ones by ``STRETCH``, at most
    ``MAX_STRETCHES`` times. ``removal.json`` records the stretches, with which a stopped run resumes, and finally all
    removals: step, part, layer.

    Raises:
        RemovalDivergedError: the removal diverged too often.
        InputError: the schedule does not fit the model or the budget.
    """
    path = folder / REMOVAL_FILE
    stretches: list[dict[str, Any]] = json.loads(path.read_text())["stretches"] if path.exists() else []
    for each in stretches:
        schedule = schedule.stretched(model, each["step"], STRETCH)
    while True:
        try:
            check_fit(run, schedule, model)
        except InputError as error:
            raise (RemovalDivergedError(f"after a jump of the loss {error}") if stretches else error) from error
        try:
            result = _train(run, data, folder, schedule, model, callbacks)
        except DivergedError as jump:
            if len(stretches) == MAX_STRETCHES:
                raise RemovalDivergedError(
                    f"the removal diverged {MAX_STRETCHES + 1} times, at last with {jump}; give more steps, a lower "
                    "learning rate, or another schedule"
                ) from jump
            step = _go_back(folder, jump.removal.step)
            schedule = schedule.stretched(model, step, STRETCH)
            stretches.append({"step": step, "jump": str(jump)})
            write_text(path, json.dumps({"stretches": stretches}, indent=2))
            log.warning("diverged: %s; back to step %d, later waits are stretched by %g", jump, step, STRETCH)
        else:
            removals = [each._asdict() for each in schedule.removals(model)]
            write_text(path, json.dumps({"stretches": stretches, "removals": removals}, indent=2))
            return result


def check_fit(run: RunConfig, schedule: RemovalSchedule, model: NormfreeConfig) -> None:
    """Checks that ``run`` can follow ``schedule`` with that model.

    Raises:
        InputError: the schedule does not fit the model, the budget has no step after its last removal, or the loss is
            not logged at every step.
    """
    if run.recipe.logging_steps != 1:
        raise InputError(
            f"a removal checks the loss of every step; set recipe.logging_steps to 1, not {run.recipe.logging_steps}"
        )
    last, n_step = schedule.removals(model)[-1], run.recipe.n_steps(run.data.sequence_length)
    if last.step >= n_step:
        raise InputError(
            f"the schedule's last removal ({last.part}) is at step {last.step}, and the budget ends after {n_step} "
            "steps; give more tokens or steps, or a shorter schedule"
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
        midway = Midway(to_change, momentum=schedule.std_momentum, special_tokens=schedule.special_tokens)
        objective: Objective = StdLoss(midway, schedule.std_loss_weight)
        if schedule.distillation_weight:
            assert run.start_from is not None, "a removal starts from a model"
            objective = Distilled(objective, run.start_from, data, schedule.distillation_weight)
        return objective, RemoveNorms(midway, schedule.removals(model))

    return train(run, data, folder, callbacks=callbacks, intervene=intervene)


def _go_back(folder: Path, step: int) -> int:
    """Deletes the checkpoints after ``step``; returns the step that the run resumes from, 0 for its beginning."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    left = last_checkpoint(folder)
    return int(left.name.removeprefix("checkpoint-")) if left is not None else 0
