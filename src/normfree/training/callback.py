"""What may follow a run, or change its model, at the steps of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normfree.modeling import NormfreeForCausalLM
from normfree.training.records import RunRecords
from normfree.training.training_plan import TrainingPlan


@dataclass
class RunState:
    """A run as its callbacks see it.

    model: the model itself, without what wraps it to train.
    records: what was logged up to ``step``.
    n_steps: optimizer steps of the whole run.
    step: updates so far.
    plan: what the whole run takes, if it is known.
    """

    model: NormfreeForCausalLM
    records: RunRecords
    n_steps: int
    step: int = 0
    plan: TrainingPlan | None = None


class Callback:
    """Called by the training loop in every process; each method does nothing unless a subclass overrides it."""

    def resume(self, run: RunState) -> None:
        """Before the checkpoint of ``run.step`` is loaded into the model, which must have the tensors it holds."""

    def begin(self, run: RunState) -> None:
        """Training begins, or resumes, at ``run.step``, with the weights of its checkpoint."""

    def begin_step(self, run: RunState) -> None:
        """Before the forward passes of the step from ``run.step`` to ``run.step`` + 1."""

    def end_step(self, run: RunState) -> None:
        """After the update, which ``run.step`` counts already."""

    def log(self, run: RunState, entries: Mapping[str, float]) -> None:
        """New ``entries``, named as in ``metrics.parquet``: ``train_loss`` (nats) and others, or ``eval_loss``."""

    def finish(self, run: RunState) -> None:
        """After the last step, or the one that a signal stopped."""
