"""Triton kernels of attention entropy: an online softmax in one pass over the keys, with attention output, and its
gradient. Import this module only where triton can be imported.

A row keeps the running maximum m of its scores, Σ e^(s-m) and Σ e^(s-m) (s-m), all in float32, and ends with

    H = ln Σ e^(s-m) - Σ e^(s-m) (s-m) / Σ e^(s-m):

two terms that are never negative, so nothing cancels, however large the scores.

Shapes: Q [batch, n_head, n_query, head_dim], K [batch, n_kv_head, n_key, head_dim], a tile of scores
[BLOCK_M queries, BLOCK_N keys]; BLOCK_D and BLOCK_V are the head dims of keys and values, padded to powers of two.
Strides are tuples in the order of these dims. Parameters are grouped by line: pointers, sizes, strides, constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(
    pointer: tl.tensor,
    rows: tl.tensor, n_row: tl.tensor,
    strides: tl.tuple,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, WIDEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[rows, BLOCK_DIM], zeros outside of the tensor, in float32 where WIDEN; offsets in 64 bits."""
    dims = tl.arange(0, BLOCK_DIM)
    inside = (rows < n_row)[:, None] & (dims < DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * strides[2] + dims[None, :] * strides[3]
    loaded = tl.load(pointer + offsets, mask=inside, other=0.0)
    if WIDEN:
        loaded = loaded.to(tl.float32)
    return loaded


@triton.jit
def _seen(
    rows: tl.tensor, keys: tl.tensor, n_query: tl.tensor, n_key: tl.tensor, window: tl.tensor,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Bool [rows, keys]: which key each query may attend to."""
    distance = (rows + (n_key - n_query))[:, None] - keys[None, :]
    seen = (rows < n_query)[:, None] & (keys < n_key)[None, :]
    if IS_CAUSAL:
        seen = seen & (distance >= 0)
    if HAS_WINDOW:
        seen = seen & (distance < window) & (distance > -window)
    if HAS_MASK:
        offsets = rows.to(tl.int64)[:, None] * mask_strides[2] + keys.to(tl.int64)[None, :] * mask_strides[3]
        seen = seen & (tl.load(mask + offsets, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _first_key(position: tl.tensor, window: tl.tensor, HAS_WINDOW: tl.constexpr) -> tl.tensor:
    first = position * 0
    if HAS_WINDOW:
        first = tl.maximum(position - window + 1, 0)
    return first


@triton.jit
def _last_key(
    position: tl.tensor, n_key: tl.tensor, window: tl.tensor, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr
) -> tl.tensor:
    """Exclusive."""
    last = n_key
    if IS_CAUSAL:
        last = position + 1
    elif HAS_WINDOW:
        last = tl.minimum(position + window, n_key)
    return last


@triton.jit
def _sweep(
    maximum: tl.tensor, total: tl.tensor, weighted: tl.tensor, output: tl.tensor, q: tl.tensor, K: tl.tensor,
    V: tl.tensor, mask: tl.tensor,
    rows: tl.tensor, start: tl.tensor, stop: tl.tensor, scale: tl.tensor, n_query: tl.tensor, n_key: tl.tensor,
    window: tl.tensor,
    k_strides: tl.tuple, v_strides: tl.tuple, mask_strides: tl.tuple,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
    ALL_SEEN: tl.constexpr, WITH_OUTPUT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The running sums after the keys ``start`` to ``stop``; ALL_SEEN says that causality and window hide none."""
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = _load_rows(K, keys, n_key, k_strides, HEAD_DIM, BLOCK_D, WIDEN)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        CHECKED: tl.constexpr = HAS_MASK or not ALL_SEEN
        if CHECKED:
            seen = _seen(
                rows, keys, n_query, n_key, window, mask, mask_strides, IS_CAUSAL and not ALL_SEEN,
                HAS_WINDOW and not ALL_SEEN, HAS_MASK,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shifted = scores - base[:, None]
        p = tl.exp2(shifted * LOG2E)
        terms = p * shifted
        if CHECKED:
            # a hidden key's 0 · -inf; that of a visible key stays, and makes the row NaN
            terms = tl.where(seen, terms, 0.0)
        decay = tl.exp2((maximum - base) * LOG2E)
        moved = tl.where(maximum == float("-inf"), 0.0, maximum - base)
        weighted = decay * (weighted + total * moved) + tl.sum(terms, 1)
        total = decay * total + tl.sum(p, 1)
        if WITH_OUTPUT:
            v = _load_rows(V, keys, n_key, v_strides, VALUE_DIM, BLOCK_V, WIDEN)
            output = output * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        maximum = new_maximum
    return maximum, total, weighted, output


@triton.jit
def forward_kernel(
    Q: tl.tensor, K: tl.tensor, V: tl.tensor, mask: tl.tensor, entropy: tl.tensor, lse: tl.tensor, out: tl.tensor,
    scale: tl.tensor, n_head: tl.tensor, group: tl.tensor, n_query: tl.tensor, n_key: tl.tensor, window: tl.tensor,
    q_strides: tl.tuple, k_strides: tl.tuple, v_strides: tl.tuple, mask_strides: tl.tuple,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr, WITH_OUTPUT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_M queries of one head. entropy, lse [batch, n_head, n_query] and out [.., VALUE_DIM] are contiguous."""
    n_block = tl.cdiv(n_query, BLOCK_M)
    program = tl.program_id(0)
    # the last queries see the most keys under a causal mask: begin with them
    start = (n_block - 1 - program % n_block) * BLOCK_M
    batch_head = (program // n_block).to(tl.int64)
    batch, head = batch_head // n_head, batch_head % n_head
    Q += batch * q_strides[0] + head * q_strides[1]
    K += batch * k_strides[0] + head // group * k_strides[1]
    V += batch * v_strides[0] + head // group * v_strides[1]
    mask += batch * mask_strides[0] + head * mask_strides[1]

    rows = start + tl.arange(0, BLOCK_M)
    q = _load_rows(Q, rows, n_query, q_strides, HEAD_DIM, BLOCK_D, WIDEN)
    top = start + (n_key - n_query)
    bottom = tl.minimum(start + BLOCK_M, n_query) - 1 + (n_key - n_query)
    lowest = _first_key(top, window, HAS_WINDOW) // BLOCK_N * BLOCK_N
    highest = _last_key(bottom, n_key, window, IS_CAUSAL, HAS_WINDOW)
    # between these two, every query sees every key
    full_from = tl.minimum(tl.cdiv(_first_key(bottom, window, HAS_WINDOW), BLOCK_N) * BLOCK_N, highest)
    full_to = tl.maximum(full_from, _last_key(top, n_key, window, IS_CAUSAL, HAS_WINDOW) // BLOCK_N * BLOCK_N)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            part_from, part_to = lowest, full_from
        elif part == 1:
            part_from, part_to = full_from, full_to
        else:
            part_from, part_to = full_to, highest
        maximum, total, weighted, output = _sweep(
            maximum, total, weighted, output, q, K, V, mask, rows, part_from, part_to, scale, n_query, n_key, window,
            k_strides, v_strides, mask_strides, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, IS_CAUSAL, HAS_WINDOW,
            HAS_MASK, part == 1, WITH_OUTPUT, WIDEN, PRECISION,
        )  # fmt: skip

    inside = rows < n_query
    places = batch_head * n_query + rows
    tl.store(entropy + places, tl.log(total) - weighted / total, mask=inside)
    tl.store(lse + places, maximum + tl.log(total), mask=inside)
    if WITH_OUTPUT:
        # a query that sees nothing gets zeros, as from scaled_dot_product_attention
        output = output / tl.where(total == 0.0, 1.0, total)[:, None]
        dims = tl.arange(0, BLOCK_V)
        stored = inside[:, None] & (dims < VALUE_DIM)[None, :]
        tl.store(out + places[:, None] * VALUE_DIM + dims[None, :], output.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _score_gradient(
    q: tl.tensor, k: tl.tensor, seen: tl.tensor, entropy: tl.tensor, lse: tl.tensor, gradient: tl.tensor,
    lse_gradient: tl.tensor,
    scale: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """scale · ∂(gradient · H + lse_gradient · lse)/∂s = -scale · p (gradient · (ln p + H) - lse_gradient), float32
    [queries, keys].
    """
    log_p = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
    p = tl.exp2(log_p * LOG2E)
    outer = gradient[:, None] * (log_p + entropy[:, None]) - lse_gradient[:, None]
    return tl.where(seen, -scale * p * outer, 0.0)


@triton.jit
def query_gradient_kernel(
    Q: tl.tensor, K: tl.tensor, mask: tl.tensor, entropy: tl.tensor, lse: tl.tensor, gradient: tl.tensor,
    lse_gradient: tl.tensor, out: tl.tensor,
    scale: tl.tensor, n_head: tl.tensor, group: tl.tensor, n_query: tl.tensor, n_key: tl.tensor, window: tl.tensor,
    q_strides: tl.tuple, k_strides: tl.tuple, mask_strides: tl.tuple,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient in BLOCK_M queries of one head; out [batch, n_head, n_query, HEAD_DIM] is contiguous."""
    n_block = tl.cdiv(n_query, BLOCK_M)
    program = tl.program_id(0)
    start = (n_block - 1 - program % n_block) * BLOCK_M
    batch_head = (program // n_block).to(tl.int64)
    batch, head = batch_head // n_head, batch_head % n_head
    Q += batch * q_strides[0] + head * q_strides[1]
    K += batch * k_strides[0] + head // group * k_strides[1]
    mask += batch * mask_strides[0] + head * mask_strides[1]

    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < n_query
    places = batch_head * n_query + rows
    q = _load_rows(Q, rows, n_query, q_strides, HEAD_DIM, BLOCK_D, True)
    row_entropy = tl.load(entropy + places, mask=inside, other=0.0)
    row_lse = tl.load(lse + places, mask=inside, other=0.0)
    row_gradient = tl.load(gradient + places, mask=inside, other=0.0)
    row_lse_gradient = tl.load(lse_gradient + places, mask=inside, other=0.0)
    lowest = _first_key(start + (n_key - n_query), window, HAS_WINDOW) // BLOCK_N * BLOCK_N
    bottom = tl.minimum(start + BLOCK_M, n_query) - 1 + (n_key - n_query)
    highest = _last_key(bottom, n_key, window, IS_CAUSAL, HAS_WINDOW)
    q_gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(lowest, highest, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = _load_rows(K, keys, n_key, k_strides, HEAD_DIM, BLOCK_D, True)
        seen = _seen(rows, keys, n_query, n_key, window, mask, mask_strides, IS_CAUSAL, HAS_WINDOW, HAS_MASK)
        score_gradient = _score_gradient(
            q, k, seen, row_entropy, row_lse, row_gradient, row_lse_gradient, scale, PRECISION
        )
        q_gradient += tl.dot(score_gradient, k, input_precision=PRECISION)
    dims = tl.arange(0, BLOCK_D)
    stored = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], q_gradient.to(out.dtype.element_ty), mask=stored)


@triton.jit
def key_gradient_kernel(
    Q: tl.tensor, K: tl.tensor, mask: tl.tensor, entropy: tl.tensor, lse: tl.tensor, gradient: tl.tensor,
    lse_gradient: tl.tensor, out: tl.tensor,
    scale: tl.tensor, n_head: tl.tensor, group: tl.tensor, n_query: tl.tensor, n_key: tl.tensor, window: tl.tensor,
    q_strides: tl.tuple, k_strides: tl.tuple, mask_strides: tl.tuple,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient in BLOCK_N keys of one head, summed over its ``group`` query heads in order; out [batch, n_head //
    group, n_key, HEAD_DIM] is contiguous.
    """
    n_block = tl.cdiv(n_key, BLOCK_N)
    program = tl.program_id(0)
    start = program % n_block * BLOCK_N
    batch_head = (program // n_block).to(tl.int64)
    batch, kv_head = batch_head // (n_head // group), batch_head % (n_head // group)
    K += batch * k_strides[0] + kv_head * k_strides[1]

    keys = start + tl.arange(0, BLOCK_N)
    k = _load_rows(K, keys, n_key, k_strides, HEAD_DIM, BLOCK_D, True)
    offset = n_key - n_query
    lowest, highest = 0, n_query
    if IS_CAUSAL:
        lowest = tl.maximum(start - offset, 0)
    elif HAS_WINDOW:
        lowest = tl.maximum(start - window + 1 - offset, 0)
    if HAS_WINDOW:
        highest = tl.minimum(start + BLOCK_N - 1 + window - offset, n_query)
    k_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in tl.range(kv_head * group, (kv_head + 1) * group):
        places = (batch * n_head + head) * n_query
        for first in tl.range(lowest // BLOCK_M * BLOCK_M, highest, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < n_query
            q_head = Q + batch * q_strides[0] + head * q_strides[1]
            q = _load_rows(q_head, rows, n_query, q_strides, HEAD_DIM, BLOCK_D, True)
            row_entropy = tl.load(entropy + places + rows, mask=inside, other=0.0)
            row_lse = tl.load(lse + places + rows, mask=inside, other=0.0)
            row_gradient = tl.load(gradient + places + rows, mask=inside, other=0.0)
            row_lse_gradient = tl.load(lse_gradient + places + rows, mask=inside, other=0.0)
            seen = _seen(
                rows,
                keys,
                n_query,
                n_key,
                window,
                mask + batch * mask_strides[0] + head * mask_strides[1],
                mask_strides,
                IS_CAUSAL,
                HAS_WINDOW,
                HAS_MASK,
            )
            score_gradient = _score_gradient(
                q, k, seen, row_entropy, row_lse, row_gradient, row_lse_gradient, scale, PRECISION
            )
            k_gradient += tl.dot(tl.trans(score_gradient), q, input_precision=PRECISION)
    dims = tl.arange(0, BLOCK_D)
    stored = (keys < n_key)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = (batch_head * n_key + keys)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + offsets, k_gradient.to(out.dtype.element_ty), mask=stored)
