"""Loss and perplexity of a model on whole sequences, which processes may share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

from normfree.data.packed_sequences import PackedSequences
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.float32_products import FastProducts
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED, token_losses
from normfree.probes import EntropyProbe
from normfree.processes import n_processes, process_index
from normfree.progress import track
from normfree.training.half_precision import autocast
from normfree.training.recipe import Recipe


@torch.no_grad()
def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean next-token loss of each sequence in nats: float32 [batch], from logits [batch, T, vocab_size].

    Tokens whose label is -100 are not predicted; NaN for a sequence of nothing else.
    """
    return _means(token_losses(logits, labels), labels)


@FastProducts()
@torch.no_grad()
def losses_of(model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean next-token loss of each sequence in nats, float32 [batch], of ``tokens`` [batch, T] without padding.

    As :func:`sequence_losses`; the logits of a Normfree model are made in blocks.
    """
    if not isinstance(model, NormfreeForCausalLM):
        return sequence_losses(model(input_ids=tokens, use_cache=False).logits, labels)
    output = model(input_ids=tokens, labels=labels, use_cache=False, return_logits=False)
    return _means(output.token_losses, labels)


@torch.no_grad()
def evaluation_losses(
    model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8, *, labels: torch.Tensor | None = None
) -> NDArray[np.float64]:
    """The mean next-token loss of each of ``sequences``, int64 [n, T] without padding, in nats: float64 [n].

    The model keeps its mode and precision. ``labels``, by default the sequences, are -100 where a token is not
    predicted.
    """
    labels = sequences if labels is None else labels
    losses = []
    batches = list(zip(sequences.split(batch_size), labels.split(batch_size), strict=True))
    for tokens, targets in track(batches, "evaluation", unit="batches"):
        losses.append(losses_of(model, tokens.to(model.device), targets.to(model.device)).cpu())
    return torch.cat(losses).double().numpy()


@torch.no_grad()
def shared_losses(
    model: PreTrainedModel,
    data: PackedSequences,
    recipe: Recipe,
    accelerator: Accelerator,
    probe: EntropyProbe | None = None,
) -> NDArray[np.float64]:
    """The mean next-token loss of each sequence of ``data`` in nats: float64 [n], in every process. Collective.

    NaN for a sequence with nothing to predict. Each sequence is read once, by one process, and seen once by its
    ``probe``; equally many batches for every process would repeat some.
    """
    model.eval()
    size = recipe.micro_batch_size
    starts = range(0, len(data), size)
    own = [range(start, min(start + size, len(data))) for start in starts[process_index() :: n_processes()]]
    losses = torch.zeros(len(data), device=accelerator.device)

    def measured(batch: dict[str, torch.Tensor], watched: AbstractContextManager[object]) -> torch.Tensor:
        tokens, labels = (batch[name].to(accelerator.device) for name in ("input_ids", "labels"))
        with watched, autocast(recipe.precision, accelerator.device, cache=not recipe.is_sharded):
            return losses_of(model, tokens, labels)

    batches = DataLoader(data, batch_sampler=[list(each) for each in own], collate_fn=default_data_collator)
    for sequences, batch in zip(track(own, "evaluation", unit="batches"), batches, strict=True):
        losses[sequences.start : sequences.stop] = measured(batch, probe or nullcontext())
    if recipe.is_sharded and len(own) < math.ceil(len(starts) / n_processes()):
        # The blocks of a sharded model are gathered by all processes together, or not at all.
        measured(default_data_collator([data[0]]), nullcontext())
    return accelerator.reduce(losses, reduction="sum").double().cpu().numpy()


def loss_on(model: PreTrainedModel, data: PackedSequences) -> float:
    """The mean loss of all predicted tokens of ``data`` in nats, in evaluation mode, in which the model is left."""
    tokens, labels = data.whole()
    return mean_loss(evaluation_losses(model.eval(), tokens, labels=labels), data.n_predicted())


def mean_loss(losses: NDArray[np.float64], n_predicted: NDArray[np.int64]) -> float:
    """The mean over the predicted tokens of all sequences, from each sequence's mean loss and their number, [n]."""
    is_measured = n_predicted > 0
    losses, weights = losses[is_measured], n_predicted[is_measured]
    return float(losses.mean() if len(set(weights)) == 1 else np.average(losses, weights=weights))


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where a double cannot hold it, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _means(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    is_predicted = labels[:, 1:] != NOT_PREDICTED
    return losses.mean(dim=1) if is_predicted.all() else losses.sum(dim=1) / is_predicted.sum(dim=1)
