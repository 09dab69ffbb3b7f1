"""Causal attention and its entropy in one pass, by the compiled CPU kernels (csrc/attention.cpp), with gradients."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfree import compiled
from normfree.compiled import ELEMENT_TYPES, WIDENED, address, library, size_array, widened

NAME, INTERFACE = "attention", 1
MOST_TOKENS = 2048
"""Up to this length a core's cache holds the keys and values of a head, and the weights of a few queries."""


class Attended(NamedTuple):
    """What :func:`causal_attention` returns.

    output: [batch, T, n_head, head_dim], in the dtype of the values.
    entropy: of the weights, nats; and first: attention to the first key. Both float32 [batch, n_head, T], without
        gradients; NaN for a query with a score that is not finite.
    """

    output: Tensor
    entropy: Tensor
    first: Tensor


def refuses() -> str | None:
    """Why the compiled kernels cannot be used on this machine; None if they can."""
    return compiled.library_refuses(NAME, INTERFACE)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if the kernels compute the causal attention of such tensors; see :func:`causal_attention`."""
    return (
        q.device.type == "cpu"
        and q.dtype in (*ELEMENT_TYPES, *WIDENED)
        and q.dtype == k.dtype == v.dtype
        and k.shape == v.shape
        and q.shape[2] == k.shape[2]
        and 1 < q.shape[2] <= MOST_TOKENS
        and 0 not in q.shape
        and refuses() is None
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Attended:
    """Softmax attention of every query to the keys up to its own position, for tensors that :func:`takes` accepts.

    Scores, softmax and sums are float32, as in flash attention. The output has a first derivative only.

    Args:
        q: [batch, n_head, T, head_dim], float32, bfloat16 or float16.
        k, v: [batch, n_kv_head, T, head_dim], of the dtype of q; n_head is a multiple of n_kv_head.
        scale: factor of q·k.
    """
    output, sums = _attention(*map(widened, (q, k, v)), scale)
    return Attended(output.to(q.dtype), *sums[2:].detach().unbind())


@torch.library.custom_op("normfree::causal_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and float32 [4, batch, n_head, T]: m and 1 / l (csrc), entropy, attention to the first key."""
    q, k, v = map(_contiguous_heads, (q, k, v))
    output, sums = _empty(q)
    library(NAME, INTERFACE).normfree_attention(
        ELEMENT_TYPES[q.dtype],
        *map(address, (q, k, v)),
        _shape(q, k),
        _strides(q, k, v),
        ctypes.c_float(scale),
        *map(address, (output, *sums.unbind())),
        torch.get_num_threads(),
    )
    return output, sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty(q)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, n_head, n_token, head_dim = q.shape
    sums = q.new_empty(4, batch, n_head, n_token, dtype=torch.float32)
    return q.new_empty(batch, n_token, n_head, head_dim), sums


@torch.library.custom_op("normfree::causal_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, output_gradient: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each [batch, T, heads, head_dim]."""
    q, k, v = map(_contiguous_heads, (q, k, v))
    output_gradient = _contiguous_heads(output_gradient.transpose(1, 2))
    gradients = _empty_gradients(q, k, v)
    library(NAME, INTERFACE).normfree_attention_backward(
        ELEMENT_TYPES[q.dtype],
        *map(address, (q, k, v, output_gradient)),
        _shape(q, k),
        _strides(q, k, v, output_gradient),
        ctypes.c_float(scale),
        *map(address, (*sums[:2].unbind(), *gradients)),
        torch.get_num_threads(),
    )
    return gradients


@_attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, output_gradient: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (each.new_empty(each.transpose(1, 2).shape) for each in (q, k, v))
    return of_query, of_key, of_value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    _, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(q, k, v, sums)


def _gradients(ctx: Any, output_gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, sums = ctx.saved_tensors
    gradients = _attention_backward(q, k, v, output_gradient, sums, ctx.scale)
    return (*(each.transpose(1, 2) for each in gradients), None)


_attention.register_autograd(_gradients, setup_context=_keep)


def _contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(q: Tensor, k: Tensor) -> ctypes.Array[ctypes.c_int64]:
    batch, n_head, n_token, head_dim = q.shape
    return size_array(batch, n_head, n_head // k.shape[1], n_token, head_dim)


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return size_array(*(stride for each in tensors for stride in each.stride()[:3]))
