# ruff: noqa: N803 (Triton's compile-time constants are written in capitals, and so are matrices)
"""Triton's kernels for sparse decode. Import this module only where triton can be imported.

No kernel needs to know on the host how many rows are active: grids cover all that there could be, and a program that
finds none left ends. So a step never waits for the GPU. Sums are float32, over blocks in a fixed order.

BLOCK_* are powers of two; sizes in plain integers, strides in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def predict_kernel(
    Q: tl.tensor,
    K1: tl.tensor,
    bias: tl.tensor,
    scores: tl.tensor,
    dim: tl.tensor,
    r: tl.tensor,
    n_inner: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """scores [n, n_inner] of BLOCK_F neurons and one query: Q [n, dim] times K1 [r, n_inner]."""
    query = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < n_inner
    total = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for start in tl.range(0, r, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        q = tl.load(Q + query * dim + rows, mask=rows < r, other=0.0).to(tl.float32)
        offsets = rows.to(tl.int64)[:, None] * n_inner + columns[None, :]
        weights = tl.load(K1 + offsets, mask=(rows < r)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += q[:, None] * weights
    result = tl.sum(total, 0)
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(scores + query * n_inner + columns, result, mask=inside)


@triton.jit
def key_scores_kernel(
    Q: tl.tensor,
    K: tl.tensor,
    scores: tl.tensor,
    scale: tl.tensor,
    head_dim: tl.tensor,
    n_kv_head: tl.tensor,
    n_key: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Predictor scores [batch · n_head, n_key] of BLOCK_T keys, for all heads that share them."""
    sequence_head = tl.program_id(1).to(tl.int64)
    K += sequence_head // n_kv_head * batch_stride + sequence_head % n_kv_head * head_stride
    keys = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_R)
    inside = (keys < n_key)[:, None] & (dims < R)[None, :]
    k = tl.load(K + keys.to(tl.int64)[:, None] * R + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    for member in tl.static_range(GROUP):
        head = sequence_head * GROUP + member
        q = tl.load(Q + head * head_dim + dims, mask=dims < R, other=0.0).to(tl.float32)
        tl.store(scores + head * n_key + keys, tl.sum(k * q[None, :], 1) * scale, mask=keys < n_key)


@triton.jit
def _seen(
    visible: tl.tensor, row: tl.tensor, columns: tl.tensor, n_column: tl.tensor, HAS_MASK: tl.constexpr
) -> tl.tensor:
    seen = columns < n_column
    if HAS_MASK:
        seen = seen & (tl.load(visible + row * n_column + columns, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _statistics(
    scores: tl.tensor,
    visible: tl.tensor,
    mask_row: tl.tensor,
    n_column: tl.tensor,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Number, mean, standard deviation and maximum of a row's visible scores."""
    total = tl.zeros([BLOCK], tl.float32)
    n_seen = tl.zeros([BLOCK], tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, n_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        seen = _seen(visible, mask_row, columns, n_column, HAS_MASK)
        x = tl.load(scores + columns, mask=seen, other=0.0)
        total += x
        n_seen += seen.to(tl.float32)
        largest = tl.maximum(largest, tl.where(seen, x, float("-inf")))
    n = tl.sum(n_seen, 0)
    mean = tl.sum(total, 0) / n
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        seen = _seen(visible, mask_row, columns, n_column, HAS_MASK)
        deviation = tl.load(scores + columns, mask=seen, other=0.0) - mean
        squares += tl.where(seen, deviation * deviation, 0.0)
    return n, mean, tl.sqrt(tl.sum(squares, 0) / n), tl.max(largest, 0)


@triton.jit
def select_kernel(
    scores: tl.tensor,
    visible: tl.tensor,
    quantiles: tl.tensor,
    indices: tl.tensor,
    chosen: tl.tensor,
    counts: tl.tensor,
    maxima: tl.tensor,
    n_column: tl.tensor,
    rows_a_mask: tl.tensor,
    HAS_MASK: tl.constexpr,
    KEEPS_LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of scores [n_row, n_column]: what lies above mean + std · quantile, gathered at the row's start.

    FFN (not KEEPS_LARGEST): ``quantiles`` has one entry; ``chosen`` is what a score has over the threshold (the score
    itself if the quantile is −∞, which keeps all); counts is −1 where the threshold is NaN. Attention (KEEPS_LARGEST):
    ``quantiles`` has one entry for each number of visible keys; ``chosen`` is the score; the largest visible score is
    kept in any case, everything where the threshold is NaN; ``maxima`` is the largest.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * n_column
    indices += row * n_column
    chosen += row * n_column
    mask_row = row // rows_a_mask
    n, mean, std, maximum = _statistics(scores, visible, mask_row, n_column, HAS_MASK, BLOCK)
    place = 0
    if KEEPS_LARGEST:
        place = n.to(tl.int32)
    quantile = tl.load(quantiles + place)
    threshold = tl.where(quantile == float("-inf"), quantile, mean + std * quantile)
    base = 0.0
    if not KEEPS_LARGEST:
        base = tl.where(quantile == float("-inf"), 0.0, threshold)
    count = 0
    for start in tl.range(0, n_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        seen = _seen(visible, mask_row, columns, n_column, HAS_MASK)
        x = tl.load(scores + columns, mask=seen, other=0.0)
        # "not at or below": a NaN threshold keeps everything
        kept = tl.where(x <= threshold, 0, 1)
        if KEEPS_LARGEST:
            kept = tl.where(x == maximum, 1, kept)
        kept = tl.where(seen, kept, 0)
        places = count + tl.cumsum(kept, 0) - 1
        tl.store(indices + places, columns, mask=kept != 0)
        tl.store(chosen + places, x - base, mask=kept != 0)
        count += tl.sum(kept, 0)
    if KEEPS_LARGEST:
        tl.store(maxima + row, maximum)
    else:
        count = tl.where(threshold == threshold, count, -1)
    tl.store(counts + row, count)


@triton.jit
def multiplier_kernel(
    Q: tl.tensor,
    K2: tl.tensor,
    bias: tl.tensor,
    indices: tl.tensor,
    counts: tl.tensor,
    multipliers: tl.tensor,
    dim: tl.tensor,
    r: tl.tensor,
    n_inner: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """K2 [n_inner, dim - r] · q[r:] for BLOCK_N active neurons of one query; later places of a row get 0."""
    query = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(counts + query)
    total = tl.zeros([BLOCK_N], tl.float32)
    if tl.program_id(0) * BLOCK_N < count:
        active = places < count
        neurons = tl.load(indices + query * n_inner + places, mask=active, other=0).to(tl.int64)
        for start in tl.range(0, dim - r, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            inside = dims < dim - r
            q = tl.load(Q + query * dim + r + dims, mask=inside, other=0.0).to(tl.float32)
            offsets = neurons[:, None] * (dim - r) + dims[None, :]
            weights = tl.load(K2 + offsets, mask=active[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(weights * q[None, :], 1)
        if HAS_BIAS:
            total += tl.load(bias + neurons, mask=active, other=0.0).to(tl.float32)
        total = tl.where(active, total, 0.0)
    tl.store(multipliers + query * n_inner + places, total, mask=places < n_inner)


@triton.jit
def weighted_rows_kernel(
    V: tl.tensor,
    indices: tl.tensor,
    counts: tl.tensor,
    weights: tl.tensor,
    partial: tl.tensor,
    n_inner: tl.tensor,
    dim: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Σ weights · V [n_inner, dim] over the active rows of one query that fall to this split: partial [n, split, dim].

    Splits take blocks of BLOCK_N rows in turn.
    """
    query = tl.program_id(2).to(tl.int64)
    split, n_split = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < dim
    count = tl.load(counts + query)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(split * BLOCK_N, count, n_split * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        active = places < count
        rows = tl.load(indices + query * n_inner + places, mask=active, other=0).to(tl.int64)
        w = tl.load(weights + query * n_inner + places, mask=active, other=0.0)
        offsets = rows[:, None] * dim + columns[None, :]
        v = tl.load(V + offsets, mask=active[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(v * w[:, None], 0)
    tl.store(partial + (query * n_split + split) * dim + columns, total, mask=inside)


@triton.jit
def attend_kernel(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    indices: tl.tensor,
    chosen: tl.tensor,
    counts: tl.tensor,
    maxima: tl.tensor,
    partial: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    head_dim: tl.tensor,
    r: tl.tensor,
    n_head: tl.tensor,
    group: tl.tensor,
    n_key: tl.tensor,
    key_batch_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_batch_stride: tl.tensor,
    value_head_stride: tl.tensor,
    REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One head's kept tokens that fall to this split: Σ e^(s-max) softplus(q·k) v, and Σ e^(s-max), to be divided."""
    row = tl.program_id(1).to(tl.int64)
    split, n_split = tl.program_id(0), tl.num_programs(0)
    sequence, kv_head = row // n_head, row % n_head // group
    K += sequence * key_batch_stride + kv_head * key_head_stride
    V += sequence * value_batch_stride + kv_head * value_head_stride
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = tl.load(Q + row * head_dim + r + dims, mask=dims < REST, other=0.0).to(tl.float32)
    count, maximum = tl.load(counts + row), tl.load(maxima + row)
    output = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(split * BLOCK_N, count, n_split * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        kept = places < count
        tokens = tl.load(indices + row * n_key + places, mask=kept, other=0).to(tl.int64)
        score = tl.load(chosen + row * n_key + places, mask=kept, other=0.0)
        inside = kept[:, None] & (dims < REST)[None, :]
        k = tl.load(K + tokens[:, None] * REST + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        product = tl.sum(k * q[None, :], 1) * scale
        softplus = tl.maximum(product, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(product)))
        weight = tl.where(kept, tl.exp(score - maximum), 0.0)
        total += weight
        inside = kept[:, None] & (columns < VALUE_DIM)[None, :]
        v = tl.load(V + tokens[:, None] * VALUE_DIM + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        output += tl.sum((weight * softplus)[:, None] * v, 0)
    tl.store(partial + (row * n_split + split) * VALUE_DIM + columns, output, mask=columns < VALUE_DIM)
    tl.store(totals + row * n_split + split, tl.sum(total, 0))
