"""transformers' Trainer with an evaluation that reads every sequence once, however many processes share them."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import EvalLoopOutput

from normfree.data.packed_sequences import PackedSequences
from normfree.probes import EntropyProbe
from normfree.training.checkpointing import CheckpointingTrainer
from normfree.training.evaluation import mean_loss, sequence_losses


class EvaluatingTrainer(CheckpointingTrainer):
    """The Trainer, whose evaluation loss is the mean over all predicted tokens.

    transformers' own gives every process equally many batches, and for that repeats sequences in the last ones: in the
    loss of these batches, and in what a probe sees, they would count twice.
    """

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's part: every n-th batch of all sequences, in order."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(data, batch_sampler=self._eval_batches(len(data)), collate_fn=default_data_collator)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *_: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> EvalLoopOutput:
        data: Any = dataloader.dataset
        losses = self.sequence_losses(data)
        loss = mean_loss(losses, data.n_predicted())
        return EvalLoopOutput(losses, None, {f"{metric_key_prefix}_loss": loss}, len(data))

    @torch.no_grad()
    def sequence_losses(self, data: PackedSequences, probe: EntropyProbe | None = None) -> NDArray[np.float64]:
        """The mean loss of each sequence in nats, float64 [n]; NaN where it has nothing to predict.

        The processes share the sequences: each is read once, and seen once by ``probe``, which sums up what the model
        does on those of this process.
        """
        model = self.measured_model
        model.eval()
        losses = torch.zeros(len(data), device=self.accelerator.device)
        batches = self._eval_batches(len(data))
        for sequences, batch in zip(batches, self.get_eval_dataloader(data), strict=True):
            with probe or contextlib.nullcontext():
                losses[sequences] = self._batch_losses(model, batch)
        n_rounds = math.ceil(math.ceil(len(data) / self.args.eval_batch_size) / self.args.world_size)
        for _ in range(n_rounds - len(batches) if self.sharded else 0):
            # The blocks of a sharded model are gathered by all processes together, or not at all.
            self._batch_losses(model, default_data_collator([data[0]]))
        return self.accelerator.reduce(losses, reduction="sum").double().cpu().numpy()

    @property
    def measured_model(self) -> PreTrainedModel:
        """The model itself, without what wraps it to train."""
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return model

    def _batch_losses(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs: Any = self._prepare_inputs(batch)
        labels = inputs.pop("labels")
        with self.compute_loss_context_manager():
            return sequence_losses(model(**inputs, use_cache=False).logits, labels)

    def _eval_batches(self, n_sequences: int) -> list[list[int]]:
        starts = range(0, n_sequences, self.args.eval_batch_size)[self.args.process_index :: self.args.world_size]
        return [list(range(start, min(start + self.args.eval_batch_size, n_sequences))) for start in starts]
