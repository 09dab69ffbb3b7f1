"""How many attention scores overflow: the NaN study of ReLU's Revival (Figure 5), without the T×T matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normfree.entropy.visibility import Visibility, visibility_of


class NonFiniteCount(NamedTuple):
    """Numbers of NaN and of infinite (+Inf and -Inf) attention scores, each int64 [n_head], over the whole
    batch.
    """

    nan: Tensor
    inf: Tensor


def count_nonfinite_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
) -> NonFiniteCount:
    """Counts the NaN and the infinite attention scores of visible keys, per head.

    Scores are computed in q's dtype as eager attention does: the product q·k rounded to it, then times ``scale``. In
    float16 the product overflows above 65,504 although the scaled score would fit, and that breaks training. Float
    masks and biases are not added, soft-caps not applied (tanh makes infinite scores finite); learned sinks are no
    scores.

    A head whose largest |q_i| times largest |k_j| is far below the dtype's maximum has none (Cauchy–Schwarz): O(T).
    The other heads are counted in blocks of query rows.

    Args:
        q: queries [batch, n_head, n_query, head_dim].
        k: keys [batch, n_kv_head, n_key, head_dim], grouped as in :func:`normfree.entropy.attention_entropy`.
        scale: factor on q·k; None means 1/sqrt(head_dim).
        is_causal: as in :func:`normfree.entropy.attention_entropy`.
        attention_mask: as there.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together.
    """
    visibility = visibility_of(q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return count_nonfinite(q, k, scale, visibility)


@torch.no_grad()
def count_nonfinite(q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> NonFiniteCount:
    """:func:`count_nonfinite_scores` for a known visibility."""
    n_head = q.shape[1]
    nan = torch.zeros(n_head, dtype=torch.int64, device=q.device)
    inf = torch.zeros_like(nan)
    group = n_head // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        k = k.to(q.dtype)
        for head in (~_certified_finite(q, k, scale)).nonzero()[:, 0].tolist():
            q_head, k_head = q[:, head], k[:, head // group]
            for block in visibility.blocks(q.shape[0] * visibility.n_key):
                scores = q_head[:, block.rows] @ k_head[:, block.columns].transpose(-1, -2) * scale
                is_nan, is_inf = scores.isnan(), scores.isinf()
                if block.allowed is not None:
                    allowed = block.allowed[:, head if block.allowed.shape[1] > 1 else 0]
                    is_nan, is_inf = is_nan & allowed, is_inf & allowed
                nan[head] += is_nan.sum()
                inf[head] += is_inf.sum()
    return NonFiniteCount(nan, inf)


def _certified_finite(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Bool [n_head]: no score of the head, nor a partial sum of one, can leave the range of the dtype."""
    limit = torch.finfo(q.dtype).max / 4
    q_largest, k_largest = (torch.stack(each.aminmax()).double().abs().amax() for each in (q, k))
    if bool(q.shape[-1] * q_largest * k_largest * max(1.0, abs(scale)) < limit):
        return torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
    return score_bound(q, k, scale) < limit


def score_bound(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """max|q_i| · max|k_j| · max(1, |scale|) [n_head], the bound of a head's scores (Cauchy–Schwarz).

    Float32, or float64 if q is; NaN or infinite if q or k are.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_norm, k_norm = (torch.linalg.vector_norm(each, dim=-1, dtype=wide).amax((0, 2)) for each in (q, k))
    return q_norm * k_norm.repeat_interleave(q.shape[1] // k.shape[1]) * max(1.0, abs(scale))
