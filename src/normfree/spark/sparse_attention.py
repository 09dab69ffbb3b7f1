"""What is different about the attention of "Spark Transformer" (2025), Section 2: which keys, and with what weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb


def spark_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    gate_query: torch.Tensor,
    gate_key: torch.Tensor,
    gate_scaling: float,
    n_active: int,
    select: Callable[..., torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(Top-k_{−∞}(q₁ K₁ᵀ)) ⊙ softplus(q₂ K₂ᵀ)) V, every weight materialised.

    query and key are the predictor's parts, [batch, n_head, n_query, r] and [batch, n_kv_head, n_key, r]; gate_query
    and gate_key the others, [..., head_dim − r]; value [batch, n_kv_head, n_key, head_dim]; ``attention_mask``
    additive, broadcastable to [batch, n_head, n_query, n_key], with the smallest number of its dtype, or −∞, at what is
    not visible. ``select`` makes the mask of the ``n_active`` keys to attend to, from the visible ones alone.

    Returns the output [batch, n_query, n_head, head_dim], and the softmax, a distribution over the attended keys:
    [batch, n_head, n_query, n_key], float32 at least. Top-k's threshold does not show in it, as softmax(x − θ) is
    softmax(x). The weights of the values are that times the gates, and do not sum to 1.
    """
    groups = query.shape[1] // key.shape[1]
    key, gate_key, value = (each.repeat_interleave(groups, dim=1) for each in (key, gate_key, value))
    scores = _at_least_float32(query @ key.transpose(-1, -2) * scaling)
    visible = None
    if attention_mask is not None:
        scores = scores + attention_mask
        visible = attention_mask > torch.finfo(attention_mask.dtype).min
    attended = select(scores, n_active, visible=visible)
    # The smallest number, not −∞: a query that sees no key is padding, and must not make NaN gradients.
    weights = scores.masked_fill(~attended, torch.finfo(scores.dtype).min).softmax(dim=-1)
    gates = F.softplus(_at_least_float32(gate_query @ gate_key.transpose(-1, -2) * gate_scaling))
    gated = F.dropout(weights * gates, p=dropout, training=module.training)
    return (gated.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


def rotate_parts(
    query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], predictor_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [..., head_dim] whose first ``predictor_dim`` dimensions, and whose others, are rotated apart.

    Rotated as one head, pairs of dimensions would lie across the two parts, and the product of two predictors would
    not depend on the relative position alone. So each part is rotated like a head of its width, with frequencies taken
    evenly from those of the whole head: for two halves every second one.
    """
    parts = []
    for columns in (slice(None, predictor_dim), slice(predictor_dim, None)):
        q, k = query[..., columns], key[..., columns]
        n_pair = rotated_pairs(q.shape[-1], query.shape[-1], position_embeddings[0].shape[-1])
        cos, sin = (_thinned(each, n_pair) for each in position_embeddings)
        parts.append(apply_rotary_pos_emb(q, k, cos, sin))
    (q1, k1), (q2, k2) = parts
    return torch.cat([q1, q2], dim=-1), torch.cat([k1, k2], dim=-1)


def rotated_pairs(width: int, head_dim: int, rotary_dim: int) -> int:
    """Pairs of dimensions that turn in a part of ``width``, in the proportion of the whole head's ``rotary_dim``."""
    return width * rotary_dim // head_dim // 2


def _thinned(embedding: torch.Tensor, n_pair: int) -> torch.Tensor:
    """Of cos or sin [..., rotary_dim], which holds every frequency twice, ``n_pair`` frequencies evenly, twice."""
    n_frequency = embedding.shape[-1] // 2
    chosen = embedding[..., [pair * n_frequency // n_pair for pair in range(n_pair)]]
    return torch.cat([chosen, chosen], dim=-1)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
