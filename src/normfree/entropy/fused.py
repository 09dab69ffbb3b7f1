"""Exact entropy of attention in memory linear in the number of keys.

With scores s, p = softmax(s) and lse = logsumexp(s), the entropy of a row (ReLU's Revival, Eq. 8, without
its ε) is

    H_i = -Σ_j p_ij ln p_ij = lse_i - Σ_j p_ij s_ij,    Σ_j p_ij s_ij = scale · q_i · (Σ_j p_ij k_j):

attention with the keys as its values, plus the logsumexp that flash kernels keep anyway. Adding one fixed
vector to all keys of a head changes nothing in p, so the keys are centred first: the two terms are then
small and their difference loses little. The compiled and the triton kernels keep the running sums of an online softmax
instead, whose difference loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from normfree.entropy import compiled_kernels
from normfree.entropy.nonfinite import score_bound
from normfree.entropy.reference import block_scores, distribution, reference_kernel
from normfree.entropy.visibility import Visibility, visibility_of
from normfree.errors import InputError, unknown_name

HALF_PRECISION = (torch.bfloat16, torch.float16)
MAX_TRITON_HEAD_DIM = 256
PART_ELEMENTS = 2**18
"""Elements of q that the CPU's backends work on at a time (1 MiB in float32), unless one sequence has more."""

Kernel = Callable[[Tensor, Tensor, float, Visibility], tuple[Tensor, Tensor]]
"""``(q, k, scale, visibility) -> (entropy, lse)``, q and k both float32 or float64, keys centred.

The triton kernel also takes half-precision q and k of one dtype as they are, keys not centred. Both results are
[batch, n_head, n_query]; ``lse`` has no gradient. Rows without a visible key, and rows that meet a non-finite
score, have NaN entropy.
"""


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    backend: str = "auto",
    sliding_window: int | None = None,
) -> Tensor:
    """Exact entropy of softmax attention for every query, in nats (ReLU's Revival, Eq. 8, without its ε).

    Differentiable in q and k (twice and more with the reference backend only). Half-precision inputs are
    raised to float32 first, float64 stays float64. The error in float32 is that of a difference of two
    numbers of the size of the scores: about 4 · 1.2e-7 · (1 + scale · max|q_i| · max|k_j - mean k|) nats, so
    1e-6 for ordinary scores and a few 1e-3 for scores of 1e4. The triton backend multiplies half-precision inputs
    as they are (their products are exact in float32) and without centring: there it is max|k_j|.

    Args:
        q: queries [batch, n_head, n_query, head_dim], any floating-point dtype.
        k: keys [batch, n_kv_head, n_key, head_dim]; n_head must be a multiple of n_kv_head (grouped keys).
        scale: factor on q·k; None means 1/sqrt(head_dim).
        is_causal: a query sees no key behind its own position; the queries are the LAST n_query of the n_key
            positions, as with a KV cache.
        attention_mask: bool (True = attend) or float (added to the scores), broadcastable to
            [batch, n_head, n_query, n_key]; or a 2-D padding mask [batch, n_key], bool or integer. In a
            float mask everything at or below half the most negative finite number of its dtype hides the
            key. Applies on top of ``is_causal`` and ``sliding_window``.
        backend: a name of ``BACKENDS``, or "auto"; :func:`select_backend` says what "auto" takes.
        sliding_window: number of keys a query sees, itself included; without causality as many on both sides.

    Returns:
        float32 [batch, n_head, n_query], never negative. NaN for a query that sees no key at all, and for a
        query that meets a NaN or infinite score.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together, or an unknown or unfit backend.
    """
    visibility = visibility_of(q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        return entropy_by_parts(q, k, scale, visibility, backend)


def entropy_by_parts(q: Tensor, k: Tensor, scale: float, visibility: Visibility, backend: str) -> Tensor:
    """:func:`attention_entropy` for a visibility that is already known."""
    return torch.cat([_evaluate(*part)[0] for part in _parts(q, k, scale, visibility, backend)])


def attention_entropy_and_sink(
    q: Tensor, k: Tensor, scale: float, visibility: Visibility, backend: str
) -> tuple[Tensor, Tensor]:
    """Entropy in nats and the attention paid to the first visible key of the sequence, from one pass.

    Both float32 [batch, n_head, n_query]; the share has no gradient, and is 0 for a query that cannot see
    that key.
    """
    with torch.autocast(q.device.type, enabled=False):
        parts = [_entropy_and_sink(*part) for part in _parts(q, k, scale, visibility, backend)]
    entropy, share = (torch.cat(each) for each in zip(*parts, strict=True))
    return entropy, share


def _entropy_and_sink(
    q: Tensor, k: Tensor, scale: float, visibility: Visibility, backend: str
) -> tuple[Tensor, Tensor]:
    entropy, lse, q, k = _evaluate(q, k, scale, visibility, backend)
    with torch.no_grad():
        sink = visibility.first_key()
        sequence = torch.arange(q.shape[0], device=q.device)[:, None]
        head = torch.arange(q.shape[1], device=q.device)
        key = k[sequence, head // (q.shape[1] // k.shape[1]), sink]
        score = scale * (q.to(lse.dtype) @ key.to(lse.dtype)[..., None])[..., 0]
        if visibility.bias is not None:
            bias = visibility.bias.expand(*q.shape[:2], *visibility.bias.shape[2:])
            score = score + bias[sequence, head, :, sink]
        share = (score - lse).exp().clamp_max(1.0).where(visibility.sees(sink), 0.0)
    return entropy, share.float()


def _parts(
    q: Tensor, k: Tensor, scale: float, visibility: Visibility, backend: str
) -> Iterator[tuple[Tensor, Tensor, float, Visibility, str]]:
    """The arguments of :func:`_evaluate` for some sequences at a time, as each takes copies of its queries and keys."""
    name = select(q, k, visibility) if backend == "auto" else backend
    n_sequence = max(1, PART_ELEMENTS // q[0].numel()) if name in ("compiled", "cpu") else q.shape[0]
    for start in range(0, q.shape[0], n_sequence):
        some = slice(start, start + n_sequence)
        yield q[some], k[some], scale, visibility.of_sequences(some), name


def _evaluate(
    q: Tensor, k: Tensor, scale: float, visibility: Visibility, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(entropy, lse, q, k)``: float32 entropy, and the logsumexp with the raised q and centred k it
    belongs to.
    """
    if backend not in BACKENDS:
        raise unknown_name("entropy backend", backend, ["auto", *BACKENDS])
    q, k = prepared(q, k, backend)
    entropy, lse = BACKENDS[backend](q, k, scale, visibility)
    return entropy.clamp_min(0.0).float(), lse, q, k


def prepared(q: Tensor, k: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """q and k as the kernel of that backend takes them."""
    if backend == "triton" and q.dtype == k.dtype and q.dtype in HALF_PRECISION:
        return q, k
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    return q, k - _centre(k.detach())


def select_backend(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
) -> str:
    """The backend that :func:`attention_entropy` takes for these inputs under ``backend="auto"``."""
    visibility = visibility_of(q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window)
    return select(q, k, visibility)


def select(q: Tensor, k: Tensor, visibility: Visibility) -> str:
    """:func:`select_backend` for a visibility that is already known."""
    if q.device.type == "cpu":
        if compiled_kernels.are_fast() and compiled_refuses(q, k, visibility) is None:
            return "compiled"
        return "cpu" if visibility.bias is None else "chunked"
    return "triton" if triton_refuses(q, k, visibility) is None else "chunked"


def compiled_refuses(q: Tensor, k: Tensor, visibility: Visibility) -> str | None:
    """Why the compiled CPU kernels cannot take these inputs; None if they can."""
    if q.device.type != "cpu":
        return f"it needs q and k on the CPU, got {q.device}"
    if torch.float64 in (q.dtype, k.dtype):
        return "it computes in float32, got float64"
    if visibility.bias is not None:
        return "it takes masks that hide keys, not float masks that add other numbers to the scores"
    return compiled_kernels.kernels_refuse()


def triton_refuses(q: Tensor, k: Tensor, visibility: Visibility) -> str | None:
    """Why the triton kernels cannot take these inputs; None if they can."""
    if find_spec("triton") is None:
        return "needs the package triton, which comes with torch's CUDA wheels"
    from normfree.entropy.triton import IS_INTERPRETED

    if torch.float64 in (q.dtype, k.dtype):
        return "computes in float32, got float64"
    if q.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"takes head dims up to {MAX_TRITON_HEAD_DIM}, got {q.shape[-1]}"
    if visibility.bias is not None:
        return "takes masks that hide keys, not float masks that add other numbers to the scores"
    if q.device.type != ("cpu" if IS_INTERPRETED else "cuda") or torch.version.hip is not None:
        return f"needs q and k on an NVIDIA GPU (or the CPU and Triton's interpreter), got {q.device}"
    return None


def _centre(k: Tensor) -> Tensor:
    """The mean key [batch, n_kv_head, 1, head_dim] of the finite entries, so that one bad key spoils
    itself alone.
    """
    centre = k.mean(2, keepdim=True)
    return centre if centre.isfinite().all() else k.where(k.isfinite(), 0.0).mean(2, keepdim=True)


def _chunked(q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Scores in blocks of query rows: any device, any mask, O(rows · n_key) memory."""
    entropies, lses = [], []
    for block in visibility.blocks(q.shape[0] * q.shape[1] * visibility.n_key):
        attention = distribution(block_scores(q, k, scale, block), block.allowed)
        entropies.append(attention.entropy())
        lses.append(attention.lse)
    return torch.cat(entropies[::-1], dim=-1), torch.cat(lses[::-1], dim=-1)


def _compiled(q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """One pass by the C++ kernels."""
    reason = compiled_refuses(q, k, visibility)
    if reason is not None:
        raise InputError(f"backend 'compiled' cannot be used: {reason}; use 'auto' or 'chunked'")
    return compiled_kernels.entropy_and_lse(q, k, scale, visibility)


def _cpu(q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """torch's flash attention for CPU with the keys as the values."""
    if q.device.type != "cpu":
        raise InputError(f"backend 'cpu' needs q and k on the CPU, got {q.device}; use 'auto' or 'chunked'")
    if visibility.bias is not None:
        raise InputError(
            "backend 'cpu' takes masks that hide keys, not float masks that add other numbers to the scores; "
            "use 'auto' or 'chunked'"
        )
    if not _scores_stay_finite(q, k, scale):
        # the kernel turns a NaN row into zeros, and a NaN key into NaN for rows that cannot see it
        return _chunked(q, k, scale, visibility)

    allowed = visibility.allowed
    aligned = visibility.has_full_rows or (visibility.sliding_window is None and visibility.n_query == visibility.n_key)
    if aligned and (allowed is None or allowed.shape[2] == 1):
        causal = not visibility.has_full_rows
        entropy, lse = _flash(q, k, scale, is_causal=causal, allowed=allowed)
    else:
        n_mask = 1 if allowed is None else allowed.shape[0] * allowed.shape[1]
        parts = [
            _flash(q[:, :, block.rows], k[:, :, block.columns], scale, is_causal=False, allowed=block.allowed)
            for block in visibility.blocks(n_mask * visibility.n_key)
        ]
        entropy, lse = (torch.cat(part[::-1], dim=-1) for part in zip(*parts, strict=True))
    if allowed is not None:
        # the kernel gives such a row the plausible numbers 0 and 0
        sees_nothing = visibility.counts == 0
        entropy, lse = entropy.masked_fill(sees_nothing, torch.nan), lse.masked_fill(sees_nothing, -torch.inf)
    return entropy, lse


def _flash(q: Tensor, k: Tensor, scale: float, *, is_causal: bool, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    # the kernel reads head_dim as contiguous without looking
    q, k = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k))
    mask = None
    if allowed is not None:
        mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    mean_key, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, k, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return lse - scale * mean_key.mul_(q).sum(-1), lse


def _scores_stay_finite(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether |q_i||k_j| (Cauchy–Schwarz) leaves every score finite; False where q or k have NaN or Inf."""
    return bool((score_bound(q, k, scale) < torch.finfo(q.dtype).max / 16).all())


class _RecomputedEntropy(torch.autograd.Function):
    """A kernel without a gradient of its own, and the gradient recomputed in blocks of query rows.

    ∂H_i/∂s_ij = -p_ij (ln p_ij + H_i). The logsumexp that a flash kernel returns must not be differentiated:
    torch has no derivative for it and does not say so.
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, q: Tensor, k: Tensor, scale: float, visibility: Visibility
    ) -> tuple[Tensor, Tensor]:
        entropy, lse = kernel(q, k, scale, visibility)
        ctx.save_for_backward(q, k)
        ctx.scale, ctx.visibility = scale, visibility
        ctx.mark_non_differentiable(lse)
        return entropy, lse

    @staticmethod
    def backward(ctx: Any, entropy_grad: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise InputError(
                "the entropy of a fast backend has a first derivative only, and create_graph=True asks for the "
                "second; use backend='reference'"
            )
        q, k = ctx.saved_tensors
        scale, visibility = ctx.scale, ctx.visibility
        batch, n_head, _, head_dim = q.shape
        n_kv_head = k.shape[1]
        q_grad, k_grad = torch.empty_like(q), torch.zeros_like(k)
        with torch.autocast(q.device.type, enabled=False):
            for block in visibility.blocks(batch * n_head * visibility.n_key):
                attention = distribution(block_scores(q, k, scale, block), block.allowed)
                row_entropy = -(attention.p * attention.log_p).sum(-1, keepdim=True)
                row_grad = scale * entropy_grad[:, :, block.rows, None]
                score_grad = -attention.p * (attention.log_p + row_entropy) * row_grad
                score_grad = score_grad.view(batch, n_kv_head, -1, score_grad.shape[-1])
                q_rows = q[:, :, block.rows].reshape(batch, n_kv_head, -1, head_dim)
                keys = k[:, :, block.columns]
                q_grad[:, :, block.rows] = (score_grad @ keys).view(batch, n_head, -1, head_dim)
                k_grad[:, :, block.columns] += score_grad.transpose(-1, -2) @ q_rows
        return None, q_grad, k_grad, None, None


def _triton(q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """One pass in Triton, forward and backward."""
    reason = triton_refuses(q, k, visibility)
    if reason is not None:
        raise InputError(f"backend 'triton' {reason}; use 'auto' or 'chunked'")
    from normfree.entropy.triton import TritonEntropy

    result: tuple[Tensor, Tensor] = TritonEntropy.apply(q, k, scale, visibility)
    return result


BACKENDS: dict[str, Kernel] = {
    "reference": reference_kernel,
    "compiled": partial(_RecomputedEntropy.apply, _compiled),
    "cpu": partial(_RecomputedEntropy.apply, _cpu),
    "chunked": partial(_RecomputedEntropy.apply, _chunked),
    "triton": _triton,
}
"""The kernels by name. All are differentiable in q and k; a new one is one line."""
