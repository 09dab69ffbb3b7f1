"""Entropy on CUDA: launches the kernels of ``triton_softmax``. Import it only where triton can be imported."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from normfree.entropy.triton_softmax import forward_kernel, key_gradient_kernel, query_gradient_kernel
from normfree.entropy.visibility import Visibility
from normfree.errors import InputError

MIN_BLOCK = 16
"""Least side of a matrix for ``tl.dot``."""


class _Tiles(NamedTuple):
    """Queries and keys of a tile of scores, key tiles loaded ahead, and warps of a program."""

    m: int
    n: int
    stages: int
    warps: int = 4


IS_INTERPRETED = not isinstance(forward_kernel, JITFunction)
"""True if Triton runs in its interpreter (TRITON_INTERPRET=1 when imported), which takes CPU tensors."""


class TritonEntropy(torch.autograd.Function):
    """``apply(q, k, scale, visibility) -> (entropy, lse)``, both float32.

    q and k have one dtype, float32 or half. The gradients are recomputed in blocks, in float32, each written by
    one program: the same inputs give the same bits.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> tuple[Tensor, Tensor]:
        entropy, lse, _ = _forward(q, k, None, scale, visibility)
        ctx.save_for_backward(q, k, entropy, lse)
        ctx.scale, ctx.visibility = scale, visibility
        ctx.set_materialize_grads(False)
        return entropy, lse

    @staticmethod
    def backward(ctx: Any, entropy_grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise InputError(
                "the entropy of a fast backend has a first derivative only, and create_graph=True asks for the "
                "second; use backend='reference'"
            )
        q, k, entropy, lse = ctx.saved_tensors
        tiles = _tiles(4 * q.shape[-1], is_backward=True)
        shared = _shared_arguments(q, k, ctx.scale, ctx.visibility, tiles)
        entropy_grad, lse_grad = (
            torch.zeros_like(lse) if each is None else each.float().contiguous() for each in (entropy_grad, lse_grad)
        )
        rows = {"entropy": entropy, "lse": lse, "gradient": entropy_grad, "lse_gradient": lse_grad}
        q_grad, k_grad = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k))
        precision = _precision(torch.float32)
        with torch.cuda.device_of(q):
            n_program = triton.cdiv(q.shape[2], tiles.m) * q.shape[0] * q.shape[1]
            query_gradient_kernel[(n_program,)](Q=q, K=k, out=q_grad, PRECISION=precision, **rows, **shared)
            n_program = triton.cdiv(k.shape[2], tiles.n) * k.shape[0] * k.shape[1]
            key_gradient_kernel[(n_program,)](Q=q, K=k, out=k_grad, PRECISION=precision, **rows, **shared)
        return q_grad, k_grad, None, None


def fused_attention_and_entropy(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """``(output, entropy, lse)`` from one pass, without gradients.

    Output [batch, n_head, n_query, value_dim] in the dtype of v, which is that of q and k; zeros for a query that
    sees no key.
    """
    entropy, lse, output = _forward(q, k, v, scale, visibility)
    assert output is not None
    return output, entropy, lse


def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor | None]:
    entropy, lse = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    values = k if v is None else v
    output = None if v is None else torch.empty((*q.shape[:3], v.shape[-1]), dtype=v.dtype, device=q.device)
    value_dim = MIN_BLOCK if v is None else v.shape[-1]
    tiles = _tiles(max(q.shape[-1], value_dim) * q.element_size(), is_backward=False)
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(q.shape[2], tiles.m) * q.shape[0] * q.shape[1],)](
            Q=q,
            K=k,
            V=values,
            entropy=entropy,
            lse=lse,
            out=entropy if output is None else output,
            v_strides=values.stride(),
            VALUE_DIM=value_dim,
            BLOCK_V=_block_dim(value_dim),
            WITH_OUTPUT=output is not None,
            WIDEN=IS_INTERPRETED,  # its tl.dot multiplies the bit patterns of bfloat16
            PRECISION=_precision(q.dtype),
            **_shared_arguments(q, k, scale, visibility, tiles),
        )
    return entropy, lse, output


def _shared_arguments(q: Tensor, k: Tensor, scale: float, visibility: Visibility, tiles: _Tiles) -> dict[str, Any]:
    mask = q
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if visibility.allowed is not None:
        mask = visibility.allowed.view(torch.uint8)
        mask_strides = mask.expand(*q.shape[:3], k.shape[2]).stride()
    return {
        "mask": mask,
        "scale": scale,
        "n_head": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "n_query": visibility.n_query,
        "n_key": visibility.n_key,
        "window": visibility.sliding_window or 0,
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "mask_strides": mask_strides,
        "HEAD_DIM": q.shape[-1],
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_D": _block_dim(q.shape[-1]),
        "IS_CAUSAL": visibility.is_causal,
        "HAS_WINDOW": visibility.sliding_window is not None,
        "HAS_MASK": visibility.allowed is not None,
        "num_stages": tiles.stages,
        "num_warps": tiles.warps,
    }


def _block_dim(dim: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(dim))


def _tiles(row_bytes: int, *, is_backward: bool) -> _Tiles:
    """Tiles that leave the queries' and keys' rows of ``row_bytes`` within 128 KiB of shared memory (A100, H100)."""
    if is_backward:
        return _Tiles(32, 32, 1) if row_bytes > 512 else _Tiles(64, 32, 1)
    if row_bytes <= 256:
        return _Tiles(128, 64, 3, warps=8)
    return _Tiles(64, 32, 2) if row_bytes <= 512 else _Tiles(32, 32, 1)


def _precision(dtype: torch.dtype) -> str:
    """Products of half-precision numbers are exact; those of float32 take three passes of tensor cores."""
    return "tf32x3" if dtype == torch.float32 and not IS_INTERPRETED else "ieee"
