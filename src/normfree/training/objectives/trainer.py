"""transformers' Trainer with an objective of ours in place of plain cross-entropy."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.data.packed_sequences import NOT_PREDICTED
from normfree.files import written_whole
from normfree.probes import EntropyRecorder
from normfree.training.objectives.objective import Objective

OBJECTIVE_FILE = "objective.safetensors"
CROSS_ENTROPY = "cross_entropy_nats"


class ObjectiveTrainer(Trainer):
    """Minimises ``objective``; without one it is transformers' Trainer, step for step. Evaluation is cross-entropy.

    Every term has the weight in a step that its micro-batch's predicted tokens have among those of the whole batch, as
    the Trainer gives it to the cross-entropy, so gradient accumulation and several processes change nothing. The log
    entry of each training loss also has ``cross_entropy_nats`` and the terms, each the mean over the steps since the
    last one.

    The objective's learned parameters are in the optimizer without weight decay, outside of gradient clipping, and in
    ``objective.safetensors`` of each checkpoint.
    """

    objective: Objective | None

    def __init__(self, *, objective: Objective | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.objective = objective
        self._learned: list[nn.Parameter] = []
        self._sums: dict[str, Tensor] = {}
        self._n_steps = 0
        if objective is not None:
            objective.to(self.args.device)
            self._learned = list(objective.learned.values())
            self.add_callback(_ClearGradients(self._learned))

    def load_objective(self, checkpoint: Path) -> None:
        """Sets what the objective learned to its values in ``checkpoint``, before training goes on from there."""
        if self.objective is not None and self._learned:
            self.objective.learned.load_state_dict(load_file(checkpoint / OBJECTIVE_FILE))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._learned:
            optimizer.add_param_group({"params": self._learned, "weight_decay": 0.0})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._n_steps += 1
            for parameter in self._learned:
                # The model's gradients are averaged over the processes by its wrapper; these have none.
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        objective = self.objective
        if objective is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        recorder = EntropyRecorder(model) if objective.reads_entropy else None
        with recorder or contextlib.nullcontext():
            cross_entropy, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with self.accelerator.autocast():
            entropy = recorder.per_head() if recorder is not None else None
            terms = objective.terms(inputs["input_ids"], outputs.logits, entropy)
        assert num_items_in_batch is not None, "counted wherever there are labels"
        n_predicted = (inputs["labels"][:, 1:] != NOT_PREDICTED).sum()
        share = n_predicted * self.accelerator.num_processes / num_items_in_batch
        loss = objective.cross_entropy_weight * cross_entropy
        self._add(CROSS_ENTROPY, cross_entropy)
        for name, term in terms.items():
            loss = loss + share * term.weight * term.value
            self._add(name, share * term.value)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            sums = self.accelerator.reduce(self._sums, reduction="mean")
            logs = {**logs, **{name: value.item() / self._n_steps for name, value in sums.items()}}
            self._sums, self._n_steps = {}, 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.objective is not None and self._learned and self.args.should_save:
            state = {name: value.cpu().contiguous() for name, value in self.objective.learned.state_dict().items()}
            with written_whole(Path(output_dir or str(self.args.output_dir)) / OBJECTIVE_FILE) as temporary:
                save_file(state, temporary)

    def _add(self, name: str, value: Tensor) -> None:
        before = self._sums.get(name)
        self._sums[name] = value.detach() if before is None else before + value.detach()


class _ClearGradients(TrainerCallback):
    """Forgets gradients after each step: the Trainer does so for the model's parameters only."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for parameter in self._parameters:
            parameter.grad = None
