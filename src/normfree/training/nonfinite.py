"""What a run does at the first loss or gradient that is NaN or infinite: go on, stop, or go back and around it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.errors import RunFailedError
from normfree.files import write_text
from normfree.training.recipe import OnNonfinite
from normfree.training.records import RunRecords
from normfree.training.shards import own_part
from normfree.training.telemetry import all_finite

REWINDS_FILE = "rewinds.json"
REWINDS = "rewinds"
"""The metric: how often the run had been rewound when it took this step for the last time."""


class NonfiniteError(Exception):
    """The loss or the gradient of optimizer step ``step`` (from 1) is not finite; the weights have not taken it."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: the {what} is not finite")
        self.step = step


class NonfiniteWatch(TrainerCallback):
    """Raises :class:`NonfiniteError` before the update that would spoil the weights; every process does, or none.

    With fp16 only the loss is looked at: gradients that overflow belong to the search for a loss scale, which skips
    their update.
    """

    def __init__(self, records: RunRecords, *, scaled: bool) -> None:
        self._records = records
        self._scaled = scaled
        self._loss: Tensor | None = None
        self.trainer: Trainer | None = None

    def see(self, loss: Tensor) -> None:
        """The loss of a micro-batch."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._loss is not None, "a step has a loss"
        assert self.trainer is not None, "set by whoever adds this callback"
        bad_loss = ~self._loss.isfinite()
        gradients = [each.grad for each in kwargs["model"].parameters() if each.grad is not None]
        bad_gradient = ~torch.stack([own_part(each).isfinite().all() for each in gradients]).all()
        bad = torch.stack([bad_loss, bad_gradient & (not self._scaled)]).float()
        in_loss, in_gradient = self.trainer.accelerator.reduce(bad, reduction="sum").tolist()
        self._loss = None
        if in_loss or in_gradient:
            self._records.flush()
            raise NonfiniteError(state.global_step + 1, "loss" if in_loss else "gradient")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save and not all_finite(kwargs["model"]):
            raise NonfiniteError(state.global_step, "model")


@dataclass(frozen=True)
class Rewind:
    """A time that a run was sent back.

    bad_step: the step (from 1) whose loss or gradient was not finite.
    to_step: the checkpoint it went back to, 0 for its beginning.
    at: sequences trained on before that checkpoint, of those that are not skipped.
    skipped: sequences left out of the order from there on: those of the steps from ``to_step`` to ``bad_step``.
    """

    bad_step: int
    to_step: int
    at: int
    skipped: int


def load_rewinds(folder: Path) -> list[Rewind]:
    """How often the run in ``folder`` was sent back, and where."""
    path = folder / REWINDS_FILE
    return [Rewind(**each) for each in json.loads(path.read_text())] if path.exists() else []


def save_rewinds(folder: Path, rewinds: Sequence[Rewind]) -> None:
    write_text(folder / REWINDS_FILE, json.dumps([asdict(each) for each in rewinds], indent=2) + "\n")


class RecordRewinds(TrainerCallback):
    """Puts a row into the metrics of the first step that is taken again."""

    def __init__(self, records: RunRecords, rewinds: Sequence[Rewind], tokens_per_step: int) -> None:
        self._records = records
        self._rewinds = rewinds
        self._tokens_per_step = tokens_per_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any(each.to_step == state.global_step for each in self._rewinds):
            step, n = state.global_step + 1, float(len(self._rewinds))
            self._records.add_metric(step, step * self._tokens_per_step, self._records.wall_seconds, REWINDS, n)


@dataclass(frozen=True)
class Batches:
    """How an epoch of ``length`` sequences is cut: ``batch_size`` of them go into a step, however many processes share
    them; a last, smaller step is left out. The next epoch has another order, and leaves out others."""

    length: int
    batch_size: int

    @property
    def per_epoch(self) -> int:
        """Sequences that are trained on in an epoch."""
        return self.length // self.batch_size * self.batch_size

    def before(self, step: int) -> int:
        """Sequences trained on in the first ``step`` steps."""
        return step * self.batch_size

    def rewind(self, bad_step: int, to_step: int) -> Rewind:
        """Back to ``to_step`` and past the batches up to that of ``bad_step``."""
        at = self.before(to_step)
        return Rewind(bad_step, to_step, at, self.before(bad_step) - at)


class TrainingOrder(Sampler[int]):
    """The order of the Trainer's own sampler (accelerate's SeedableRandomSampler), in whole steps, with the sequences
    of ``rewinds`` left out and all that follow moved up; an epoch keeps its length. Each process is given its part of
    every step, so the sequences of a step do not depend on their number. ``epochs`` has to be among the callbacks."""

    def __init__(self, batches: Batches, rewinds: Sequence[Rewind], seed: int) -> None:
        self._batches = batches
        self._rewinds = rewinds
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def epochs(self) -> TrainerCallback:
        """Says when an epoch begins: a data loader that leaves out what a run has seen does not, if it is shared."""
        return _Epochs(self, self._batches)

    def __len__(self) -> int:
        return self._batches.per_epoch

    def __iter__(self) -> Iterator[int]:
        begin = self._epoch * len(self)
        orders: dict[int, list[int]] = {}
        for place in range(begin, begin + len(self)):
            shifted = place + sum(each.skipped for each in self._rewinds if each.at <= place)
            epoch, index = divmod(shifted, len(self))
            if epoch not in orders:
                orders[epoch] = self._order(epoch)
            yield orders[epoch][index]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(self._batches.length, generator=generator).tolist()


class _Epochs(TrainerCallback):
    def __init__(self, order: TrainingOrder, batches: Batches) -> None:
        self._order = order
        self._steps_per_epoch = batches.per_epoch // batches.batch_size

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._order.set_epoch(state.global_step // self._steps_per_epoch)


def halted(error: NonfiniteError, checkpoint: Path | None, policy: OnNonfinite, n_rewinds: int) -> RunFailedError:
    """The error that ends a run which may not, or no longer, go on."""
    kept = f"{checkpoint.name} is the last good checkpoint" if checkpoint is not None else "there is no checkpoint yet"
    if policy == "halt":
        return RunFailedError(f"{error}; stopped, as recipe.on_nonfinite asks for; {kept}")
    return RunFailedError(
        f"{error}, after {n_rewinds} rewinds already (recipe.max_rewinds); {kept}; lower recipe.learning_rate"
    )
