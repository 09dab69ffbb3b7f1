"""The attention of "Spark Transformer" (2025), Section 2: which keys a query attends to, and with what weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from normfree.errors import InputError
from normfree.spark.selection import at_least_float32
from normfree.spark.topk import TOPKS

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of positions, each [batch or 1, T, rotated dimensions of a head]."""


EAGER = "eager"
"""The one attention implementation of transformers that sparse attention has."""


class SparkKeys(nn.Module):
    """What makes a softmax attention sparse: attention to the k keys that the first r dimensions choose.

    (softmax(Top-k_{−∞}(q[:r] K[:r]ᵀ / √r)) ⊙ softplus(q[r:] K[r:]ᵀ / √(head_dim − r))) V ("Spark Transformer",
    Section 2). Each part is rotated separately (:func:`rotate_parts`). The paper gives the equation without the two
    scales and does not mention rotary positions.

    A mixin for a module with the projections and the cache of softmax attention. It has one implementation, ``eager``;
    the weights that it returns are the softmax, a distribution, so :class:`normfree.EntropyProbe` reads its entropy.
    """

    implementation: str | None = EAGER
    config: Any
    head_dim: int
    layer_idx: int
    o_proj: Any

    if TYPE_CHECKING:

        def project(
            self, x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], position_embeddings: Rotation | None
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def set_choice(self, predictor_dim: int, n_active: int, topk: str) -> None:
        """The first ``predictor_dim`` dimensions choose ``n_active`` keys by the top-k of that name."""
        self.predictor_dim, self.n_active = predictor_dim, n_active
        self.select = TOPKS[topk].mask
        self.scaling = predictor_dim**-0.5
        self.gate_scaling = (self.head_dim - predictor_dim) ** -0.5

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies rotary positions to each part of query and key [batch, heads, T, head_dim]."""
        return rotate_parts(query, key, position_embeddings, self.predictor_dim)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [batch, n_query, n_head, head_dim] and the softmax [batch, n_head, n_query, n_key].

        Raises:
            InputError: the configuration names another attention implementation, for which masks would be made.
        """
        if self.config._attn_implementation != EAGER:
            raise InputError(
                f"attention spark has the implementation {EAGER} only, and the configuration names "
                f"{self.config._attn_implementation!r}; use model.set_attn_implementation({EAGER!r})"
            )
        r = self.predictor_dim
        # Through the interface, where probes listen.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(EAGER, spark_attention_forward)
        attended: tuple[torch.Tensor, torch.Tensor] = attend(
            self,
            query[..., :r],
            key[..., :r],
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            gate_query=query[..., r:],
            gate_key=key[..., r:],
            gate_scaling=self.gate_scaling,
            n_active=self.n_active,
            select=self.select,
            **kwargs,
        )
        return attended


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
    additive, broadcastable to [batch, n_head, n_query, n_key], the smallest number of its dtype or −∞ where a key is
    not visible. ``select`` makes the mask of the ``n_active`` keys to attend to, from the visible ones.

    Returns the output [batch, n_query, n_head, head_dim], and the softmax over the attended keys, float32 at least
    [batch, n_head, n_query, n_key]; softmax(x − θ) is softmax(x). The weights of the values, the softmax times the
    gates, do not sum to 1.
    """
    groups = query.shape[1] // key.shape[1]
    key, gate_key, value = (each.repeat_interleave(groups, dim=1) for each in (key, gate_key, value))
    scores = at_least_float32(query @ key.transpose(-1, -2) * scaling)
    visible = None
    if attention_mask is not None:
        scores = scores + attention_mask
        visible = attention_mask > torch.finfo(attention_mask.dtype).min
    attended = select(scores, n_active, visible=visible)
    # The smallest number, not −∞: a query that sees no key is padding, and must not make NaN gradients.
    weights = scores.masked_fill(~attended, torch.finfo(scores.dtype).min).softmax(dim=-1)
    gates = F.softplus(at_least_float32(gate_query @ gate_key.transpose(-1, -2) * gate_scaling))
    gated = F.dropout(weights * gates, p=dropout, training=module.training)
    return (gated.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


def rotate_parts(
    query: torch.Tensor, key: torch.Tensor, position_embeddings: Rotation, predictor_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [..., head_dim] with the first ``predictor_dim`` dimensions and the others rotated separately.

    Rotated as one head, pairs of dimensions would lie across the two parts, and the product of two predictors would
    depend on more than the relative position. Each part is rotated like a head of its width, with frequencies taken
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
    """Rotated pairs of dimensions in a part of ``width``, in the proportion of the whole head's ``rotary_dim``."""
    return width * rotary_dim // head_dim // 2


def _thinned(embedding: torch.Tensor, n_pair: int) -> torch.Tensor:
    """``n_pair`` evenly taken frequencies of cos or sin [..., rotary_dim]; both hold every frequency twice."""
    n_frequency = embedding.shape[-1] // 2
    chosen = embedding[..., [pair * n_frequency // n_pair for pair in range(n_pair)]]
    return torch.cat([chosen, chosen], dim=-1)
