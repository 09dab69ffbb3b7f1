"""Which sequences each step trains on, and the batches that a rewound run skips."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from normfree.files import write_text
from normfree.processes import n_processes, process_index

REWINDS_FILE = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """One return of a run to a checkpoint.

    bad_step: the step (from 1) whose loss or gradient was not finite.
    to_step: the checkpoint's step, 0 for the beginning of the run.
    at: sequences trained on before that checkpoint, skipped ones not counted.
    skipped: sequences left out of the order from there on: those of the steps from ``to_step`` to ``bad_step``.
    """

    bad_step: int
    to_step: int
    at: int
    skipped: int


def load_rewinds(folder: Path) -> list[Rewind]:
    """All rewinds of the run in ``folder``, oldest first."""
    path = folder / REWINDS_FILE
    return [Rewind(**each) for each in json.loads(path.read_text())] if path.exists() else []


def save_rewinds(folder: Path, rewinds: Sequence[Rewind]) -> None:
    """Replaces the rewinds of the run in ``folder``."""
    write_text(folder / REWINDS_FILE, json.dumps([asdict(each) for each in rewinds], indent=2) + "\n")


class TrainingOrder:
    """The sequences of every step: a new permutation in each epoch, cut into whole steps.

    The permutation depends on the seed and the epoch alone (that of accelerate's SeedableRandomSampler), and the
    sequences of a step not on the number of processes. A last, smaller step of an epoch is left out. Batches skipped by
    ``rewinds`` are cut out of this order, and all that follow move up.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rewinds: Sequence[Rewind] = ()) -> None:
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._rewinds = rewinds
        self._permutations: dict[int, torch.Tensor] = {}
        self.steps_per_epoch = length // batch_size

    def rewind(self, bad_step: int, to_step: int) -> Rewind:
        """Back to ``to_step`` and past the batches up to that of ``bad_step``."""
        at = to_step * self._batch_size
        return Rewind(bad_step, to_step, at, bad_step * self._batch_size - at)

    def step(self, step: int) -> list[int]:
        """The sequences of step ``step``, counted from 0."""
        # Every `at` and `skipped` is a number of whole steps.
        skipped = sum(each.skipped for each in self._rewinds if each.at <= step * self._batch_size)
        epoch, place = divmod(step + skipped // self._batch_size, self.steps_per_epoch)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._permutations = {epoch: torch.randperm(self._length, generator=generator)}
        return self._permutations[epoch][place * self._batch_size : (place + 1) * self._batch_size].tolist()

    def begins_epoch(self, step: int) -> bool:
        """True if step ``step`` is the first of an epoch."""
        return step % self.steps_per_epoch == 0

    def micro_batches(self, step: int, size: int) -> Iterator[list[int]]:
        """This process's micro-batches of ``size`` sequences, from ``step`` to the end of its epoch."""
        while True:
            sequences = self.step(step)
            for start in range(process_index() * size, self._batch_size, n_processes() * size):
                yield sequences[start : start + size]
            step += 1
            if self.begins_epoch(step):
                return
