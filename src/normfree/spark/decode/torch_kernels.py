"""Sparse decode in torch alone: any device, any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.spark.decode.shapes import AttentionInputs, FeedForwardInputs
from normfree.spark.decode.threshold import feed_forward_quantile
from normfree.spark.selection import at_least_float32
from normfree.spark.topk import statistical_topk_mask

PADDED = 64
"""Lists of indices have a multiple of this length: torch spends up to 0.6 ms on a length that it has not met."""


def feed_forward(inputs: FeedForwardInputs) -> Tensor:
    """``sparse_feed_forward``: [n, d] in float32 (float64 for float64 inputs)."""
    q, K1 = inputs.q, inputs.K1
    r, n_inner = K1.shape
    every_row = torch.arange(r, device=q.device).expand(q.shape[0], r)
    # torch's fastest weighted sum of long rows, where a dense product of a few rows runs at half the memory's speed
    scores = F.embedding_bag(every_row, K1, per_sample_weights=q[:, :r].contiguous(), mode="sum")
    scores = at_least_float32(scores)
    if inputs.predictor_bias is not None:
        scores = scores + inputs.predictor_bias
    quantile = feed_forward_quantile(inputs.k, n_inner)
    if quantile == -torch.inf:
        excess, is_active = scores, torch.ones_like(scores, dtype=torch.bool)
        is_nan = torch.zeros_like(scores[:, :1], dtype=torch.bool)
    else:
        std, mean = torch.std_mean(scores, dim=-1, keepdim=True, correction=0)
        excess = scores - (mean + std * quantile)
        is_active, is_nan = excess > 0, std.isnan() | mean.isnan()
    out = _of_active_neurons(inputs, excess, is_active)
    return out.masked_fill_(is_nan, torch.nan)


def _of_active_neurons(inputs: FeedForwardInputs, excess: Tensor, is_active: Tensor) -> Tensor:
    n, r = inputs.q.shape[0], inputs.K1.shape[0]
    query, neuron = is_active.nonzero(as_tuple=True)
    n_active = neuron.shape[0]
    if n_active == 0:
        return excess.new_zeros(n, inputs.V.shape[1])
    padding = (0, -n_active % PADDED)
    # the padding repeats the last active neuron, with the weight 0
    query, neuron = (torch.cat([each, each[-1:].expand(padding[1])]) for each in (query, neuron))
    rows = inputs.K2.t().index_select(0, neuron)
    rest = inputs.q[:, r:]
    multipliers = (rows @ rest[0] if n == 1 else (rows * rest[query]).sum(-1, dtype=excess.dtype)).to(excess.dtype)
    if inputs.rest_bias is not None:
        multipliers = multipliers + inputs.rest_bias[neuron]
    weights = F.pad((inputs.activation(excess[query, neuron]) * multipliers)[:n_active], padding)
    starts = F.pad(is_active.sum(-1).cumsum(0)[:-1], (1, 0))
    bag = F.embedding_bag(
        neuron, inputs.V, starts, per_sample_weights=weights.to(inputs.V.dtype), mode="sum", include_last_offset=False
    )
    return bag.to(excess.dtype)


def attention(inputs: AttentionInputs) -> Tensor:
    """``sparse_attention_decode``: [batch, n_head, value_dim] in float32 (float64 for float64 inputs)."""
    predictor, rest, values = inputs.predictor_keys, inputs.rest_keys, inputs.values
    batch, n_kv_head, n_key, r = predictor.shape
    n_head = inputs.q.shape[1]
    q = inputs.q.view(batch, n_kv_head, -1, inputs.q.shape[-1])
    scores = at_least_float32(q[..., :r] @ predictor.transpose(2, 3)).view(batch, n_head, n_key)
    scores = scores * inputs.predictor_scale
    visible = None if inputs.visible is None else inputs.visible[:, None]
    keep = statistical_topk_mask(scores, inputs.k, visible=visible)

    counts = keep.sum(-1)
    longest = min(n_key, -(-int(counts.max()) // PADDED) * PADDED)
    sequence, head, key = keep.nonzero(as_tuple=True)
    starts = counts.flatten().cumsum(0) - counts.flatten()
    place = torch.arange(key.shape[0], device=key.device) - starts[sequence * n_head + head]
    keys = key.new_zeros(batch, n_head, longest)
    keys[sequence, head, place] = key
    is_kept = torch.arange(longest, device=key.device) < counts[..., None]

    sequences = torch.arange(batch, device=key.device)[:, None, None]
    kv_heads = (torch.arange(n_head, device=key.device) // (n_head // n_kv_head))[:, None]
    weights = scores.gather(-1, keys).masked_fill(~is_kept, -torch.inf).softmax(-1)
    multipliers = (rest[sequences, kv_heads, keys] @ inputs.q[..., r:, None])[..., 0].to(scores.dtype)
    # a key that is not kept has the weight 0, whatever the first key's values are
    weights = (weights * F.softplus(multipliers * inputs.rest_scale)).masked_fill(~is_kept, 0.0)
    chosen = values[sequences, kv_heads, keys].to(scores.dtype).masked_fill(~is_kept[..., None], 0.0)
    out = (weights[..., None, :] @ chosen)[..., 0, :]
    return out.masked_fill(counts[..., None] == 0, torch.nan)
