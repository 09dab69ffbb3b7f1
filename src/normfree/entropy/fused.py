"""Exact entropy of attention in memory linear in the number of keys.

With scores s, p = softmax(s) and lse = logsumexp(s), the entropy of a row (ReLU's Revival, Eq. 8, without its ε) is

    H_i = -Σ_j p_ij ln p_ij = lse_i - Σ_j p_ij s_ij,    Σ_j p_ij s_ij = scale · q_i · (Σ_j p_ij k_j):

attention with the keys as values, plus the logsumexp of flash kernels. Keys are centred first, which leaves p as it is
and makes the two terms small, so that their difference loses little; not under a soft-cap, which is not linear. The
compiled and triton kernels keep the running sums of an online softmax instead, whose difference loses nothing.

Learned sinks join afterwards, from entropy and logsumexp of the keys alone (``scoring.join_sinks``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfree.entropy import compiled_kernels
from normfree.entropy.nonfinite_scores import score_bound
from normfree.entropy.reference import block_products, block_scores, distribution, masked_scores, reference_kernel
from normfree.entropy.scoring import Scoring, check_sinks, join_sinks, scoring_of, soft_capped
from normfree.entropy.visibility import Block, Visibility, visibility_of
from normfree.errors import InputError, unknown_name

HALF_PRECISION = (torch.bfloat16, torch.float16)
MAX_TRITON_HEAD_DIM = 256
PART_ELEMENTS = 2**18
"""Elements of q that CPU backends take at a time (1 MiB in float32), unless one sequence has more."""

Kernel = Callable[[Tensor, Tensor, Scoring, Visibility], tuple[Tensor, Tensor]]
"""``(q, k, scoring, visibility) -> (entropy, lse)``, both [batch, n_head, n_query] and differentiable.

q and k are both float32 or float64, keys centred unless there is a soft-cap; the triton kernel also takes q and k of
one half precision, not centred. Rows without a visible key or with a non-finite score have NaN entropy.
"""


class Evaluated(NamedTuple):
    """Results of a backend for some sequences.

    entropy: nats, float32 [batch, n_head, n_query], learned sinks included.
    attended: share of attention that learned sinks leave to the keys, likewise; None without sinks.
    lse: of the keys alone, in the dtype of q and k, which are as the kernel took them.
    """

    entropy: Tensor
    attended: Tensor | None
    lse: Tensor
    q: Tensor
    k: Tensor


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    backend: str = "auto",
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact entropy of softmax attention for every query, in nats (ReLU's Revival, Eq. 8, without its ε).

    The softmax is over cap · tanh(scale · q·k / cap) + bias + mask of the visible keys, and a learned sink if given.

    Differentiable in q, k, bias and sinks, more than once with the reference backend only. Half precision is raised to
    float32; float64 stays. The float32 error is about 4 · 1.2e-7 · (1 + scale · max|q_i| · max|k_j - mean k|) nats:
    1e-6 for ordinary scores, a few 1e-3 for scores of 1e4. With max|k_j| instead for half precision in the triton
    backend, soft-caps and sinks, where keys are not centred.

    Args:
        q: queries [batch, n_head, n_query, head_dim], any floating-point dtype.
        k: keys [batch, n_kv_head, n_key, head_dim]; n_head must be a multiple of n_kv_head (grouped keys).
        scale: factor on q·k; None means 1/sqrt(head_dim).
        is_causal: a query sees no key after its own position; the queries are the LAST n_query of the n_key
            positions, as with a KV cache.
        attention_mask: bool (True = attend) or float (added to the scores), broadcastable to [batch, n_head, n_query,
            n_key]; or a padding mask [batch, n_key], bool or integer. In a float mask, entries at or below half the
            most negative finite number of its dtype hide the key. Applies on top of causality and window.
        backend: a name of ``BACKENDS``, or "auto" (:func:`select_backend`).
        sliding_window: number of keys a query sees, itself included; without causality as many on both sides.
        softcap: bound that tanh puts on the scaled scores before bias and mask (Gemma 2: 50); None for none.
        bias: float, added to the scores after the soft-cap (ALiBi, relative positions), broadcastable as the mask and
            hiding keys as a float mask, on top of everything above.
        sinks: logits of learned attention sinks (gpt-oss), [n_head] or [batch or 1, n_head, n_query or 1]. A sink joins
            the softmax's normaliser and is no key.

    Returns:
        float32 [batch, n_head, n_query], from 0 to ln(number of visible keys, plus one with ``sinks``). NaN for a query
        that sees no key, and for one with a NaN or infinite score or sink; a soft-cap makes infinite scores finite.
        With ``sinks``, the entropy of the whole distribution: 0 for a head that attends to the sink alone. For the
        entropy over the keys alone, renormalised, pass no sinks.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together, or an unknown or unfit backend.
    """
    visibility = visibility_of(
        q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window, bias=bias
    )
    scoring = scoring_of(q, scale, softcap)
    sinks = None if sinks is None else check_sinks(sinks, q)
    with torch.autocast(q.device.type, enabled=False):
        return entropy_and_attended(q, k, scoring, visibility, sinks, backend)[0]


def entropy_and_attended(
    q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility, sinks: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """``entropy`` and ``attended`` of :class:`Evaluated` for arguments that have been checked."""
    parts = [_evaluate(*part) for part in _parts(q, k, scoring, visibility, sinks, backend)]
    attended = [each.attended for each in parts if each.attended is not None]
    return torch.cat([each.entropy for each in parts]), torch.cat(attended) if attended else None


def attention_entropy_and_sink(
    q: Tensor,
    k: Tensor,
    scale: float,
    visibility: Visibility,
    backend: str,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy in nats and the attention paid to the first visible key of the sequence, from one pass.

    Both float32 [batch, n_head, n_query]; the share has no gradient, and is 0 for a query that cannot see that key.
    Learned ``sinks`` take their share of the attention.
    """
    scoring = scoring_of(q, scale, softcap)
    sinks = None if sinks is None else check_sinks(sinks, q)
    with torch.autocast(q.device.type, enabled=False):
        parts = [_entropy_and_sink(*part) for part in _parts(q, k, scoring, visibility, sinks, backend)]
    entropy, share = (torch.cat(each) for each in zip(*parts, strict=True))
    return entropy, share


def _entropy_and_sink(
    q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility, sinks: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    entropy, attended, lse, q, k = _evaluate(q, k, scoring, visibility, sinks, backend)
    with torch.no_grad():
        first = visibility.first_key()
        sequence = torch.arange(q.shape[0], device=q.device)[:, None]
        head = torch.arange(q.shape[1], device=q.device)
        key = k[sequence, head // (q.shape[1] // k.shape[1]), first]
        product = scoring.scale * (q.to(lse.dtype) @ key.to(lse.dtype)[..., None])[..., 0]
        score = soft_capped(product, scoring.softcap)
        if visibility.bias is not None:
            bias = visibility.bias.expand(*q.shape[:2], *visibility.bias.shape[2:])
            score = score + bias[sequence, head, :, first]
        share = (score - lse).exp().clamp_max(1.0)
        share = share if attended is None else share * attended
        return entropy, share.where(visibility.sees(first), 0.0).float()


def _parts(
    q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility, sinks: Tensor | None, backend: str
) -> Iterator[tuple[Tensor, Tensor, Scoring, Visibility, Tensor | None, str]]:
    """Arguments of :func:`_evaluate`, for some sequences at a time: it copies their queries and keys."""
    name = select(q, k, scoring, visibility) if backend == "auto" else backend
    n_sequence = max(1, PART_ELEMENTS // q[0].numel()) if name in ("compiled", "cpu") else q.shape[0]
    for start in range(0, q.shape[0], n_sequence):
        some = slice(start, start + n_sequence)
        some_sinks = sinks if sinks is None or sinks.shape[0] == 1 else sinks[some]
        yield q[some], k[some], scoring, visibility.of_sequences(some), some_sinks, name


def _evaluate(
    q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility, sinks: Tensor | None, backend: str
) -> Evaluated:
    if backend not in BACKENDS:
        raise unknown_name("entropy backend", backend, ["auto", *BACKENDS])
    q, k, centre = prepared(q, k, scoring, backend)
    entropy, lse = BACKENDS[backend](q, k, scoring, visibility)
    entropy, attended = entropy.clamp_min(0.0), None
    if sinks is not None:
        entropy, attended = join_sinks(entropy, whole_lse(lse, q, centre, scoring), sinks)
    return Evaluated(entropy.float(), attended, lse, q, k)


def prepared(q: Tensor, k: Tensor, scoring: Scoring, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """q and k as the backend's kernel takes them, and what it subtracted from k, [batch, n_kv_head, 1, head_dim]."""
    if backend == "triton" and q.dtype == k.dtype and q.dtype in HALF_PRECISION:
        return q, k, None
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    if scoring.softcap is not None:
        return q, k, None
    centre = _centre(k.detach())
    return q, k - centre, centre


def whole_lse(lse: Tensor, q: Tensor, centre: Tensor | None, scoring: Scoring) -> Tensor:
    """The logsumexp of the scores with keys that are not centred."""
    if centre is None:
        return lse
    centre = centre.repeat_interleave(q.shape[1] // centre.shape[1], dim=1)
    return lse + scoring.scale * (q @ centre.transpose(-1, -2))[..., 0]


def select_backend(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> str:
    """The backend that :func:`attention_entropy` takes for these inputs under ``backend="auto"``."""
    visibility = visibility_of(
        q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window, bias=bias
    )
    return select(q, k, scoring_of(q, None, softcap), visibility)


def select(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> str:
    """:func:`select_backend` for arguments that have been checked."""
    if q.device.type == "cpu":
        if compiled_kernels.are_fast() and compiled_refuses(q, k) is None:
            return "compiled"
        return "cpu" if scores_refuse(scoring, visibility) is None else "chunked"
    return "triton" if triton_refuses(q, k, scoring, visibility) is None else "chunked"


def scores_refuse(scoring: Scoring, visibility: Visibility) -> str | None:
    """Why a kernel for products of queries and keys alone cannot make these scores; None if it can."""
    if visibility.bias is not None:
        return "takes masks that hide keys, not biases or float masks that add other numbers to the scores"
    return None if scoring.softcap is None else f"takes scores without a soft-cap, got softcap={scoring.softcap:g}"


def compiled_refuses(q: Tensor, k: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot take these inputs; None if they can."""
    if q.device.type != "cpu":
        return f"it needs q and k on the CPU, got {q.device}"
    if torch.float64 in (q.dtype, k.dtype):
        return "it computes in float32, got float64"
    return compiled_kernels.kernels_refuse()


def triton_refuses(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> str | None:
    """Why the triton kernels cannot take these inputs; None if they can."""
    if find_spec("triton") is None:
        return "needs the package triton, which comes with torch's CUDA wheels"
    from normfree.entropy.triton_launch import IS_INTERPRETED

    if torch.float64 in (q.dtype, k.dtype):
        return "computes in float32, got float64"
    if q.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"takes head dims up to {MAX_TRITON_HEAD_DIM}, got {q.shape[-1]}"
    reason = scores_refuse(scoring, visibility)
    if reason is not None:
        return reason
    if q.device.type != ("cpu" if IS_INTERPRETED else "cuda") or torch.version.hip is not None:
        return f"needs q and k on an NVIDIA GPU (or the CPU and Triton's interpreter), got {q.device}"
    return None


def _centre(k: Tensor) -> Tensor:
    """Mean key [batch, n_kv_head, 1, head_dim] of the finite entries, so that a bad key spoils itself alone."""
    centre = k.mean(2, keepdim=True)
    return centre if centre.isfinite().all() else k.where(k.isfinite(), 0.0).mean(2, keepdim=True)


def _chunked(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Scores in blocks of query rows: any device, any scores, O(rows · n_key) memory."""
    entropies, lses = [], []
    for block in visibility.blocks(q.shape[0] * q.shape[1] * visibility.n_key):
        attention = distribution(block_scores(q, k, scoring, block), block.allowed)
        entropies.append(attention.entropy())
        lses.append(attention.lse)
    return torch.cat(entropies[::-1], dim=-1), torch.cat(lses[::-1], dim=-1)


def _compiled(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """One pass by the C++ kernels."""
    reason = compiled_refuses(q, k)
    if reason is not None:
        raise InputError(f"backend 'compiled' cannot be used: {reason}; use 'auto' or 'chunked'")
    return compiled_kernels.entropy_and_lse(q, k, scoring, visibility)


def _cpu(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """torch's flash attention for CPU with the keys as the values."""
    if q.device.type != "cpu":
        raise InputError(f"backend 'cpu' needs q and k on the CPU, got {q.device}; use 'auto' or 'chunked'")
    reason = scores_refuse(scoring, visibility)
    if reason is not None:
        raise InputError(f"backend 'cpu' {reason}; use 'auto' or 'chunked'")
    scale = scoring.scale
    if not _scores_stay_finite(q, k, scale):
        # the kernel zeroes NaN rows, and spreads a NaN key to rows that cannot see it
        return _chunked(q, k, scoring, visibility)

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
        # the kernel returns 0 and 0 for such rows
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
    """True if |q_i||k_j| (Cauchy–Schwarz) keeps every score finite; False if q or k have NaN or Inf."""
    return bool((score_bound(q, k, scale) < torch.finfo(q.dtype).max / 16).all())


class _RecomputedEntropy(torch.autograd.Function):
    """A kernel without gradient; its gradient is recomputed in blocks of query rows.

    ∂H_i/∂s_ij = -p_ij (ln p_ij + H_i) and ∂lse_i/∂s_ij = p_ij. ``bias`` is that of ``visibility``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        scoring: Scoring,
        visibility: Visibility,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k)
        ctx.scoring, ctx.visibility = scoring, visibility
        ctx.set_materialize_grads(False)
        return kernel(q, k, scoring, visibility)

    @staticmethod
    def backward(
        ctx: Any, entropy_grad: Tensor | None, lse_grad: Tensor | None
    ) -> tuple[None, Tensor, Tensor, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise InputError(
                "the entropy of a fast backend has a first derivative only, and create_graph=True asks for the "
                "second; use backend='reference'"
            )
        q, k = ctx.saved_tensors
        scoring, visibility = ctx.scoring, ctx.visibility
        batch, n_head, _, head_dim = q.shape
        n_kv_head = k.shape[1]
        q_grad, k_grad = torch.empty_like(q), torch.zeros_like(k)
        bias_grad = torch.zeros_like(visibility.bias, dtype=q.dtype) if ctx.needs_input_grad[3] else None
        with torch.autocast(q.device.type, enabled=False):
            for block in visibility.blocks(batch * n_head * visibility.n_key):
                score_grad, product_grad = _block_gradients(q, k, scoring, block, entropy_grad, lse_grad)
                if bias_grad is not None and block.bias is not None:
                    rows = block.rows if bias_grad.shape[2] > 1 else slice(None)
                    bias_grad[:, :, rows, block.columns] += score_grad.sum_to_size(block.bias.shape)
                product_grad = product_grad.view(batch, n_kv_head, -1, product_grad.shape[-1])
                q_rows = q[:, :, block.rows].reshape(batch, n_kv_head, -1, head_dim)
                keys = k[:, :, block.columns]
                q_grad[:, :, block.rows] = (product_grad @ keys).view(batch, n_head, -1, head_dim)
                k_grad[:, :, block.columns] += product_grad.transpose(-1, -2) @ q_rows
        return None, q_grad, k_grad, bias_grad, None, None


def _block_gradients(
    q: Tensor, k: Tensor, scoring: Scoring, block: Block, entropy_grad: Tensor | None, lse_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients in the scores of a block and in its q·k: both [batch, n_head, rows, columns]."""
    capped = soft_capped(block_products(q, k, scoring.scale, block), scoring.softcap)
    attention = distribution(masked_scores(capped, block), block.allowed)
    score_grad = torch.zeros_like(attention.p)
    if entropy_grad is not None:
        row_entropy = -(attention.p * attention.log_p).sum(-1, keepdim=True)
        score_grad = -attention.p * (attention.log_p + row_entropy) * entropy_grad[:, :, block.rows, None]
    if lse_grad is not None:
        score_grad = score_grad + attention.p * lse_grad[:, :, block.rows, None]
    slope = scoring.scale if scoring.softcap is None else scoring.scale * (1 - (capped / scoring.softcap).square())
    return score_grad, score_grad * slope


def _recomputed(
    kernel: Kernel, q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _RecomputedEntropy.apply(kernel, q, k, visibility.bias, scoring, visibility)
    return result


def _triton(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """One pass in Triton, forward and backward."""
    reason = triton_refuses(q, k, scoring, visibility)
    if reason is not None:
        raise InputError(f"backend 'triton' {reason}; use 'auto' or 'chunked'")
    from normfree.entropy.triton_launch import TritonEntropy

    result: tuple[Tensor, Tensor] = TritonEntropy.apply(q, k, scoring.scale, visibility)
    return result


BACKENDS: dict[str, Kernel] = {
    "reference": reference_kernel,
    "compiled": partial(_recomputed, _compiled),
    "cpu": partial(_recomputed, _cpu),
    "chunked": partial(_recomputed, _chunked),
    "triton": _triton,
}
"""Kernels by name, differentiable in q, k and the bias."""
