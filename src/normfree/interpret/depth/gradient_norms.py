"""Gradient norms of the loss by layer, in the parameters of each block and in the residual stream it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from transformers import PreTrainedModel

from normfree.columns import STANDARD_ERROR
from normfree.interpret.depth.averages import mean_and_standard_error
from normfree.interpret.depth.block_calls import record
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.modeling.linear_cross_entropy import token_losses


def measure_gradient_norms(
    model: PreTrainedModel, tokens: torch.Tensor, batch_size: int = 8, n_beginning: int = 0
) -> pd.DataFrame:
    """The gradient of the mean next-token loss over ``tokens`` (int64 [n, T]), by layer; ``.grad`` is not changed.

    The first ``n_beginning`` tokens of a sequence are not predicted.

    Returns:
        The frame ``gradient_norms`` of a measurement: layer; parameter_gradient_norm (nats): norm of the gradient of
        the mean loss in all parameters of the block, shared ones included; residual_gradient_norm: norm of the gradient
        of a sequence's own loss in the residual stream [T, d] at the block's input, mean over sequences, and its
        standard_error.
    """
    blocks = [list(block.parameters()) for block in decoder_blocks(model).values()]
    parameters = list({id(each): each for block in blocks for each in block}.values())
    sums = [torch.zeros_like(each, dtype=torch.float32) for each in parameters]
    of_streams = []
    known = max(0, n_beginning - 1)
    with torch.enable_grad(), _trainable(model):
        for batch in tokens.split(batch_size):
            recorded = record(model, batch)
            losses = token_losses(recorded.logits[:, known:], recorded.tokens[:, known:]).mean(dim=1)
            streams = recorded.streams[:-1]
            # Sequences are independent: in the stream, the gradient of the sum is each sequence's own.
            gradients = torch.autograd.grad(losses.sum(), [*streams, *parameters], allow_unused=True)
            norms = [each.double().flatten(start_dim=1).norm(dim=1).cpu() for each in gradients[: len(streams)]]
            of_streams.append(torch.stack(norms))
            for total, gradient in zip(sums, gradients[len(streams) :], strict=True):
                if gradient is not None:
                    total += gradient.detach()
    squares = {
        id(each): float((total.double() / len(tokens)).square().sum())
        for each, total in zip(parameters, sums, strict=True)
    }
    norm, error = mean_and_standard_error(torch.cat(of_streams, dim=1))
    return pd.DataFrame(
        {
            "layer": range(len(blocks)),
            "parameter_gradient_norm": [sum(squares[id(each)] for each in block) ** 0.5 for block in blocks],
            "residual_gradient_norm": norm,
            STANDARD_ERROR: error,
        }
    )


@contextmanager
def _trainable(model: PreTrainedModel) -> Iterator[None]:
    """While active, every floating-point parameter of ``model`` requires a gradient."""
    frozen = [each for each in model.parameters() if each.is_floating_point() and not each.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each in frozen:
            each.requires_grad_(False)
