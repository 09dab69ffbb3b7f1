"""The loss when a layer is skipped (its block the identity), alone or with all layers after it."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch

from normfree.columns import LOSS_NATS, STANDARD_ERROR
from normfree.interpret.depth.averages import mean_and_standard_error
from normfree.interpret.depth.block_calls import RecordedPass


@torch.no_grad()
def losses_without_each(recorded: RecordedPass) -> torch.Tensor:
    """The loss of each sequence with one layer skipped, nats: float64 [n_layer, batch].

    The blocks before it are not run again.
    """
    return torch.stack([_losses(recorded, layer, layer + 1) for layer in range(len(recorded.calls))])


@torch.no_grad()
def losses_without_last(recorded: RecordedPass) -> torch.Tensor:
    """The loss of each sequence without the last k layers, k = 1 ... n_layer − 1, nats: float64 [n_layer − 1, batch].

    Final norm and unembedding read the input of the first layer that is dropped.
    """
    n_layer = len(recorded.calls)
    losses = [_losses(recorded, n_layer - n_dropped, n_layer) for n_dropped in range(1, n_layer)]
    return torch.stack(losses) if losses else torch.empty(0, len(recorded.tokens), dtype=torch.float64)


def loss_increase_frame(name: str, numbers: Iterable[int], losses: torch.Tensor, plain: torch.Tensor) -> pd.DataFrame:
    """The frames ``skipped_layers`` and ``dropped_last`` of a measurement.

    Args:
        name: of the column of ``numbers``: layer or n_dropped.
        numbers: one a row.
        losses: of each sequence, nats, [n_row, n_sequence].
        plain: of each sequence with all layers, nats, [n_sequence].

    Returns:
        ``name``, loss_nats, loss_increase_nats (over the plain loss, mean over sequences), standard_error (of the
        increase, over sequences, nats), nonfinite_sequences (whose loss is not finite; the means then are not either).
    """
    increase, error = mean_and_standard_error(losses - plain)
    columns = {
        name: list(numbers),
        LOSS_NATS: mean_and_standard_error(losses)[0],
        "loss_increase_nats": increase,
        STANDARD_ERROR: error,
        "nonfinite_sequences": (~losses.isfinite()).sum(dim=1).numpy(),
    }
    return pd.DataFrame(columns)


def _losses(recorded: RecordedPass, start: int, stop: int) -> torch.Tensor:
    """Without the layers from ``start`` to before ``stop``; float64 [batch]."""
    calls = recorded.calls
    kept = {layer: call.output for layer, call in enumerate(calls[:start])}
    skipped = {layer: calls[layer].output_with(calls[start].stream) for layer in range(start, stop)}
    return recorded.losses(recorded.logits_with(kept | skipped)).double().cpu()
