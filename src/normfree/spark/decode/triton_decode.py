"""Sparse decode on CUDA: launches the kernels of ``triton_decode_kernels``. Import only where triton is installed."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from normfree.spark.decode.shapes import AttentionInputs, FeedForwardInputs
from normfree.spark.decode.threshold import attention_quantiles, feed_forward_quantile
from normfree.spark.decode.triton_decode_kernels import (
    attend_kernel,
    key_scores_kernel,
    multiplier_kernel,
    predict_kernel,
    select_kernel,
    weighted_rows_kernel,
)

IS_INTERPRETED = not isinstance(predict_kernel, JITFunction)
"""Whether Triton runs in its interpreter (TRITON_INTERPRET=1 when it was imported), which takes CPU tensors."""

SPLITS = 8
"""Programs that share the active rows of a query, so that one query keeps a GPU busy; summed in a fixed order."""


def feed_forward(inputs: FeedForwardInputs) -> Tensor:
    """``sparse_feed_forward`` in Triton: float32 [n, d]."""
    q, K1, V = inputs.q.contiguous(), inputs.K1, inputs.V
    (n, dim), (r, n_inner), d = q.shape, K1.shape, V.shape[1]
    scores, excess, multipliers = q.new_empty((3, n, n_inner), dtype=torch.float32)
    excess.zero_()  # the activation is taken of the places behind a row's count too
    indices = q.new_empty((n, n_inner), dtype=torch.int32)
    counts = q.new_empty(n, dtype=torch.int32)
    partial = q.new_empty((n, SPLITS, d), dtype=torch.float32)
    quantile = torch.full((1,), feed_forward_quantile(inputs.k, n_inner), device=q.device)
    predictor_bias, rest_bias = inputs.predictor_bias, inputs.rest_bias
    sizes = {"dim": dim, "r": r, "n_inner": n_inner}
    with torch.cuda.device_of(q):
        predict_kernel[(triton.cdiv(n_inner, 64), n)](
            Q=q,
            K1=K1,
            bias=q if predictor_bias is None else predictor_bias,
            scores=scores,
            **sizes,
            HAS_BIAS=predictor_bias is not None,
            BLOCK_R=32,
            BLOCK_F=64,
        )
        _select(scores, None, quantile, indices, excess, counts, maxima=None, rows_a_mask=1)
        multiplier_kernel[(triton.cdiv(n_inner, 16), n)](
            Q=q,
            K2=inputs.K2,
            bias=q if rest_bias is None else rest_bias,
            indices=indices,
            counts=counts,
            multipliers=multipliers,
            **sizes,
            HAS_BIAS=rest_bias is not None,
            BLOCK_N=16,
            BLOCK_D=128,
        )
        weights = inputs.activation(excess) * multipliers
        weighted_rows_kernel[(triton.cdiv(d, 128), SPLITS, n)](
            V=V,
            indices=indices,
            counts=counts,
            weights=weights,
            partial=partial,
            n_inner=n_inner,
            dim=d,
            BLOCK_N=16,
            BLOCK_D=128,
        )
    return partial.sum(1).masked_fill_((counts < 0)[:, None], torch.nan)


def attention(inputs: AttentionInputs) -> Tensor:
    """``sparse_attention_decode`` in Triton: float32 [batch, n_head, value_dim]."""
    q, predictor, rest, values = inputs.q.contiguous(), inputs.predictor_keys, inputs.rest_keys, inputs.values
    batch, n_kv_head, n_key, r = predictor.shape
    n_head, head_dim, value_dim = q.shape[1], q.shape[2], values.shape[3]
    group, n_row = n_head // n_kv_head, batch * n_head
    scores, chosen = q.new_empty((2, n_row, n_key), dtype=torch.float32)
    indices = q.new_empty((n_row, n_key), dtype=torch.int32)
    counts = q.new_empty(n_row, dtype=torch.int32)
    maxima = q.new_empty(n_row, dtype=torch.float32)
    partial = q.new_empty((batch, n_head, SPLITS, value_dim), dtype=torch.float32)
    totals = q.new_empty((batch, n_head, SPLITS), dtype=torch.float32)
    with torch.cuda.device_of(q):
        key_scores_kernel[(triton.cdiv(n_key, 64), batch * n_kv_head)](
            Q=q,
            K=predictor,
            scores=scores,
            scale=inputs.predictor_scale,
            head_dim=head_dim,
            n_kv_head=n_kv_head,
            n_key=n_key,
            batch_stride=predictor.stride(0),
            head_stride=predictor.stride(1),
            R=r,
            GROUP=group,
            BLOCK_R=triton.next_power_of_2(r),
            BLOCK_T=64,
        )
        quantiles = attention_quantiles(inputs.k, n_key, q.device)
        _select(scores, inputs.visible, quantiles, indices, chosen, counts, maxima, rows_a_mask=n_head)
        attend_kernel[(SPLITS, n_row)](
            Q=q,
            K=rest,
            V=values,
            indices=indices,
            chosen=chosen,
            counts=counts,
            maxima=maxima,
            partial=partial,
            totals=totals,
            scale=inputs.rest_scale,
            head_dim=head_dim,
            r=r,
            n_head=n_head,
            group=group,
            n_key=n_key,
            key_batch_stride=rest.stride(0),
            key_head_stride=rest.stride(1),
            value_batch_stride=values.stride(0),
            value_head_stride=values.stride(1),
            REST=rest.shape[3],
            VALUE_DIM=value_dim,
            BLOCK_N=16,
            BLOCK_D=triton.next_power_of_2(rest.shape[3]),
            BLOCK_V=triton.next_power_of_2(value_dim),
        )
    return partial.sum(2) / totals.sum(2)[..., None]


def _select(
    scores: Tensor,
    visible: Tensor | None,
    quantiles: Tensor,
    indices: Tensor,
    chosen: Tensor,
    counts: Tensor,
    maxima: Tensor | None,
    rows_a_mask: int,
) -> None:
    """Launches ``select_kernel`` on scores [n_row, n_column]; with ``maxima`` each row keeps its largest."""
    select_kernel[(scores.shape[0],)](
        scores=scores,
        visible=scores if visible is None else visible.contiguous().view(torch.uint8),
        quantiles=quantiles,
        indices=indices,
        chosen=chosen,
        counts=counts,
        maxima=scores if maxima is None else maxima,
        n_column=scores.shape[1],
        rows_a_mask=rows_a_mask,
        HAS_MASK=visible is not None,
        KEEPS_LARGEST=maxima is not None,
        BLOCK=1024,
    )
