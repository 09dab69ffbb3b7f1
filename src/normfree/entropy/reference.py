"""Attention entropy by its definition, from materialised scores: the reference of all backends.

ReLU's Revival, Eq. 8, without its ε: H_i = -Σ_j p_ij ln p_ij with p_i = softmax(s_i).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normfree.entropy import compiled_kernels
from normfree.entropy.scoring import Scoring, check_sinks, scoring_of, soft_capped
from normfree.entropy.visibility import BLOCK_ELEMENTS, Block, Visibility, visibility_of

MAX_TOTAL_ERROR = 1e-3
"""Largest difference of a query's summed weights from 1."""
CAUSAL_PARTS = 4
"""Least number of blocks of rows: under causality the first need not read the last keys."""


class Distribution(NamedTuple):
    """Softmax of scores over the last dim: ``p`` and ``log_p`` are 0 at hidden keys; ``lse`` is the logsumexp."""

    p: Tensor
    log_p: Tensor
    lse: Tensor

    def entropy(self) -> Tensor:
        """In nats; NaN where no key is visible."""
        return (-(self.p * self.log_p).sum(-1)).masked_fill(self.lse == -torch.inf, torch.nan)


def block_products(q: Tensor, k: Tensor, scale: float, block: Block) -> Tensor:
    """scale · q·k [batch, n_head, rows, columns] of one block, in the dtype of q and k."""
    batch, n_head, _, head_dim = q.shape
    n_kv_head = k.shape[1]
    q_rows = (q[:, :, block.rows] * scale).reshape(batch, n_kv_head, -1, head_dim)
    products = q_rows @ k[:, :, block.columns].transpose(-1, -2)
    return products.view(batch, n_head, -1, products.shape[-1])


def masked_scores(scores: Tensor, block: Block) -> Tensor:
    """Scores of one block with its bias, -inf at hidden keys."""
    if block.bias is not None:
        scores = scores + block.bias.to(scores.dtype)
    return scores if block.allowed is None else scores.masked_fill(~block.allowed, -torch.inf)


def block_scores(q: Tensor, k: Tensor, scoring: Scoring, block: Block) -> Tensor:
    """Scores [batch, n_head, rows, columns] of one block, soft-capped, biased, -inf at hidden keys, in q's dtype."""
    return masked_scores(soft_capped(block_products(q, k, scoring.scale, block), scoring.softcap), block)


def distribution(scores: Tensor, allowed: Tensor | None) -> Distribution:
    """Softmax of scores that are -inf where not ``allowed``, with gradients free of 0·inf at hidden keys."""
    lse = scores.logsumexp(-1)
    log_p = scores - lse[..., None]
    if allowed is None:
        return Distribution(log_p.exp(), log_p, lse)
    log_p = log_p.masked_fill(~allowed, 0.0)
    return Distribution(log_p.exp().masked_fill(~allowed, 0.0), log_p, lse)


class ReadWeights(NamedTuple):
    """Entropy in nats and attention to the first visible key of each query, float32 [batch, n_head, n_query] each.

    Entropy is NaN for a query with NaN weights and for one that sees no key. ``all_scores_finite``: known, because no
    weight is NaN or 0 (that of a score of -inf); False if not known.
    """

    entropy: Tensor
    sink_share: Tensor
    all_scores_finite: bool


def read_weights(weights: Tensor, visibility: Visibility) -> ReadWeights | None:
    """Reads attention weights, float32 or float64 [batch, n_head, n_query, n_key].

    None if the rows are no distributions, as under attention dropout.
    """
    all_positive = False
    if weights.dtype == torch.float32 and weights.device.type == "cpu" and compiled_kernels.are_fast():
        entropy, share, are_distributions, all_positive = compiled_kernels.weights_entropy(
            weights, visibility, max_total_error=MAX_TOTAL_ERROR
        )
    else:
        entropy, share = _entropy_by_blocks(weights, visibility), weights[..., 0]
        are_distributions = not bool(((weights.sum(-1) - 1).abs() > MAX_TOTAL_ERROR).any())
    if not are_distributions:
        return None
    if visibility.allowed is not None:
        sink = visibility.first_key().expand(*weights.shape[:2])[..., None, None]
        share = weights.gather(-1, sink.expand(-1, -1, weights.shape[2], -1))[..., 0]
        entropy = entropy.masked_fill(visibility.counts == 0, torch.nan)
    return ReadWeights(entropy.float(), share.float(), all_scores_finite=all_positive)


def _entropy_by_blocks(weights: Tensor, visibility: Visibility) -> Tensor:
    n_query, tiny = visibility.n_query, torch.finfo(weights.dtype).tiny
    n_row = max(1, min(BLOCK_ELEMENTS // weights[:, :, 0].numel(), n_query // CAUSAL_PARTS))
    parts = []
    for start in range(0, n_query, n_row):
        rows = slice(start, min(start + n_row, n_query))
        p = weights[:, :, rows, visibility.columns(rows)]
        # ln is several times slower at zeros; p ln p is negligible at the smallest normal number
        parts.append(-_log_(p.clamp_min(tiny)).mul_(p).sum(-1))
    return torch.cat(parts, dim=-1)


def _log_(x: Tensor) -> Tensor:
    """ln of x, in place."""
    if x.device.type != "cpu":
        return x.log_()
    values = x.numpy()
    np.log(values, out=values)  # vectorized: a third of the time of torch's
    return x


def reference_kernel(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """``(entropy, lse)`` [batch, n_head, n_query] with the whole score matrix in memory; a ``fused.Kernel``."""
    block = visibility.block(0, visibility.n_query)
    attention = distribution(block_scores(q, k, scoring, block), block.allowed)
    return attention.entropy(), attention.lse


def attention_entropy_reference(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Entropy [batch, n_head, n_query] in nats, computed and returned in ``dtype``; differentiable.

    Arguments and errors are those of :func:`normfree.entropy.attention_entropy`. Memory: O(n_query · n_key).
    """
    visibility = visibility_of(
        q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window, bias=bias
    )
    scoring = scoring_of(q, scale, softcap)
    with torch.autocast(q.device.type, enabled=False):
        block = visibility.block(0, visibility.n_query)
        scores = block_scores(q.to(dtype), k.to(dtype), scoring, block)
        if sinks is None:
            return distribution(scores, block.allowed).entropy().clamp_min(0.0)
        sees_no_key = (scores == -torch.inf).all(-1)
        sink = check_sinks(sinks, q).to(dtype)[..., None].expand(*scores.shape[:3], 1)
        allowed = None
        if block.allowed is not None:
            allowed = torch.nn.functional.pad(block.allowed, (0, 1), value=True)
        attention = distribution(torch.cat([scores, sink], dim=-1), allowed)
        return attention.entropy().clamp_min(0.0).masked_fill(sees_no_key, torch.nan)
