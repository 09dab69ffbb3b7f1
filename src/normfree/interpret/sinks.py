"""Attention sinks, and the residual stream's std by position: two things that norm removal changes."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch
from transformers import PreTrainedModel

from normfree.columns import SINK_QUERY_SHARE, SINK_SHARE
from normfree.errors import InputError
from normfree.interpret.head_entropy import measure_attention_entropy
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.probes.layer_statistics import SINK_THRESHOLD
from normfree.probes.probe import read_calls


def attention_sinks(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8) -> pd.DataFrame:
    """The attention that each head pays to the first token of ``sequences`` (int64 [n, T], no padding).

    Over all queries, including the first, which sees nothing else.

    Returns:
        layer, head, sink_share (mean over queries), sink_query_share (share of the queries above 0.3; its mean over
        heads is the sink rate of "Transformers Don't Need LayerNorm at Inference Time", as its public code has it),
        is_sink (``sink_share`` above 0.3; its mean over heads is Gu et al.'s sink rate). A head with a NaN query has
        NaN shares and is no sink.

    Raises:
        InputError: there is no token, or no attention layer of the model can be read.
    """
    _check(sequences)
    heads = measure_attention_entropy(model, sequences, batch_size).heads
    return heads[["layer", "head", SINK_SHARE, SINK_QUERY_SHARE]].assign(is_sink=heads[SINK_SHARE] > SINK_THRESHOLD)


@torch.no_grad()
def residual_std_by_position(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8) -> pd.DataFrame:
    """The std of the residual stream after each block over channels, by position, as the mean over sequences.

    It is a LayerNorm's divisor, sqrt(mean((x − mean(x))²)), without eps, in float64. NaN and Inf propagate.

    Args:
        model: a transformers decoder, which keeps its mode.
        sequences: int64 [n, T], no padding.
        batch_size: sequences a pass.

    Returns:
        layer, position (both from 0), residual_std (in the units of the stream); a row each.

    Raises:
        InputError: there is no token, or the model has no list of decoder blocks.
    """
    _check(sequences)
    blocks = list(decoder_blocks(model).values())
    sums = torch.zeros(len(blocks), sequences.shape[1], dtype=torch.float64)

    def add(layer: int, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        x = output[0] if isinstance(output, tuple) else output
        sums[layer] += x.double().std(dim=-1, correction=0).sum(dim=0).cpu()

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            read_calls(stack, block, partial(add, layer))
        for batch in sequences.split(batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    index = pd.MultiIndex.from_product([range(size) for size in sums.shape], names=["layer", "position"])
    return pd.DataFrame({"residual_std": (sums / len(sequences)).numpy().ravel()}, index=index).reset_index()


def _check(sequences: torch.Tensor) -> None:
    if sequences.ndim != 2 or not sequences.numel():
        raise InputError(f"need token ids [n, T] with n and T at least 1, got {list(sequences.shape)}")
