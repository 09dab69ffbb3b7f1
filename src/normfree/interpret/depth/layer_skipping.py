"""The loss when a layer is skipped (its block the identity), alone or all from some layer on."""

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

    The blocks before it put out what they did in the recorded pass.
    """
    calls = recorded.calls
    losses = []
    for layer, call in enumerate(calls):
        before = {earlier: calls[earlier].output for earlier in range(layer)}
        losses.append(_losses(recorded, before | {layer: call.output_with(call.stream)}))
    return torch.stack(losses)


@torch.no_grad()
def losses_without_last(recorded: RecordedPass) -> torch.Tensor:
    """The loss of each sequence without the last k layers, k = 1 ... n_layer − 1, nats: float64 [n_layer − 1, batch].

    Final norm and unembedding read the input of the first layer that is dropped.
    """
    calls = recorded.calls
    n_layer = len(calls)
    losses = []
    for n_dropped in range(1, n_layer):
        first = n_layer - n_dropped
        kept = {layer: calls[layer].output for layer in range(first)}
        dropped = {layer: calls[layer].output_with(calls[first].stream) for layer in range(first, n_layer)}
        losses.append(_losses(recorded, kept | dropped))
    if not losses:
        return torch.empty(0, len(recorded.tokens), dtype=torch.float64)
    return torch.stack(losses)


def loss_increase_frame(name: str, numbers: Iterable[int], losses: torch.Tensor, plain: torch.Tensor) -> pd.DataFrame:
    """The frames ``skipped_layers`` and ``dropped_last`` of a measurement.

    Args:
        name: what ``numbers`` are: layer, or n_dropped.
        numbers: one a row.
        losses: of each sequence, nats, [n_row, n_sequence].
        plain: of each sequence with all layers, nats, [n_sequence].

    Returns:
        ``name``, loss_nats, loss_increase_nats (over the plain loss, mean over sequences), standard_error (of the
        increase, over sequences, nats), nonfinite_sequences (how many have a loss that is not finite; where there is
        one, the means are not finite).
    """
    loss, _ = mean_and_standard_error(losses)
    increase, error = mean_and_standard_error(losses - plain)
    return pd.DataFrame(
        {
            name: list(numbers),
            LOSS_NATS: loss,
            "loss_increase_nats": increase,
            STANDARD_ERROR: error,
            "nonfinite_sequences": (~losses.isfinite()).sum(dim=1).numpy(),
        }
    )


def _losses(recorded: RecordedPass, outputs: dict[int, object]) -> torch.Tensor:
    return recorded.losses(recorded.logits_with(outputs)).double().cpu()
