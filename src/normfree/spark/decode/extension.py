"""Sparse decode by the compiled CPU kernels (csrc/spark_decode.cpp)."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree import compiled
from normfree.compiled import ELEMENT_TYPES, address, size_array, sizes
from normfree.spark.decode.shapes import Activation, AttentionInputs, FeedForwardInputs
from normfree.spark.decode.threshold import attention_quantiles, feed_forward_quantile

NAME, INTERFACE = "spark_decode", 2
ELSEWHERE, GELU, GELU_TANH, RELU, SILU = range(5)
"""Activations that the kernels compute (``enum Activation`` in csrc); torch applies any other between two calls."""
FUNCTIONS = ((F.gelu, GELU), (F.relu, RELU), (torch.relu, RELU), (F.silu, SILU))
MODULES: dict[type, int] = {nn.ReLU: RELU, nn.SiLU: SILU}


def extension_refuses() -> str | None:
    """Why the compiled kernels cannot be used on this machine; None if they can."""
    return compiled.library_refuses(NAME, INTERFACE)


def feed_forward(inputs: FeedForwardInputs) -> Tensor:
    """``sparse_feed_forward`` on the CPU: float32 [n, d]."""
    K1, K2, V, n = inputs.K1, inputs.K2, inputs.V, inputs.q.shape[0]
    n_inner = K1.shape[1]
    q, activation = inputs.q.float().contiguous(), _activation(inputs.activation)
    biases = [_float32(bias) for bias in (inputs.predictor_bias, inputs.rest_bias)]
    scratch, counts, out = torch.empty(4, n, n_inner), torch.empty(n, dtype=torch.int32), torch.empty(n, V.shape[1])
    compiled.library(NAME, INTERFACE).normfree_feed_forward(
        ELEMENT_TYPES[K1.dtype],
        activation,
        *map(address, (K1, K2, V)),
        size_array(n, K1.shape[0], K2.shape[0], n_inner, V.shape[1]),
        ctypes.c_double(feed_forward_quantile(inputs.k, n_inner)),
        *map(address, (q, *biases, scratch, counts, out)),
        torch.get_num_threads(),
    )
    if activation != ELSEWHERE:
        return out
    _, weights, multipliers, indices = scratch
    most = max(0, *counts.tolist())
    # the same operations on the places behind a row's count, which nobody reads
    weights[:, :most] = inputs.activation(weights[:, :most]) * multipliers[:, :most]
    return weighted_rows(V, weights, indices.view(torch.int32), counts)


def _activation(function: Activation) -> int:
    if type(function) is nn.GELU:
        return GELU if function.approximate == "none" else GELU_TANH
    known = (code for each, code in FUNCTIONS if each is function)
    return MODULES.get(type(function)) or next(known, ELSEWHERE)


def weighted_rows(
    matrix: Tensor, weights: Tensor, indices: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Σ_i weights[v, i] · matrix[indices[v, i]]: float32 [n, dim]; NaN in rows with a count below 0.

    matrix [n_row, dim], float32 or bfloat16, contiguous; weights float32 [n, n_row]; indices int32 [n, n_row], of which
    the first ``counts[v]`` (int32 [n]) count. Without them, all rows: a dense product.
    """
    out = torch.empty(weights.shape[0], matrix.shape[1])
    compiled.library(NAME, INTERFACE).normfree_weighted_rows(
        ELEMENT_TYPES[matrix.dtype],
        address(matrix),
        *sizes(weights.shape[0], *matrix.shape),
        *map(address, (indices, counts, weights, out)),
        torch.get_num_threads(),
    )
    return out


def all_dots(matrix: Tensor, vectors: Tensor) -> Tensor:
    """vectors · matrixᵀ, the dense product of few vectors: float32 [n, n_row].

    matrix [n_row, dim], float32 or bfloat16, contiguous; vectors float32 [n, dim], contiguous.
    """
    out = torch.empty(vectors.shape[0], matrix.shape[0])
    compiled.library(NAME, INTERFACE).normfree_all_dots(
        ELEMENT_TYPES[matrix.dtype],
        address(matrix),
        *sizes(vectors.shape[0], *matrix.shape),
        *map(address, (vectors, out)),
        torch.get_num_threads(),
    )
    return out


def attention(inputs: AttentionInputs) -> Tensor:
    """``sparse_attention_decode`` on the CPU: float32 [batch, n_head, value_dim]."""
    predictor, rest, values = inputs.predictor_keys, inputs.rest_keys, inputs.values
    batch, n_kv_head, n_key, r = predictor.shape
    n_head, value_dim = inputs.q.shape[1], values.shape[-1]
    q = inputs.q.float().contiguous()
    visible = None if inputs.visible is None else inputs.visible.contiguous()
    scores = torch.empty(batch, n_head, n_key)
    counts, out = torch.empty((batch, n_head), dtype=torch.int32), torch.empty(batch, n_head, value_dim)
    strides = [stride for tensor in (predictor, rest, values) for stride in tensor.stride()[:2]]
    shape = (batch, n_kv_head, n_head // n_kv_head, n_key, r, rest.shape[-1], value_dim, *strides)
    compiled.library(NAME, INTERFACE).normfree_attend(
        ELEMENT_TYPES[predictor.dtype],
        *map(address, (predictor, rest, values)),
        size_array(*shape),
        *map(address, (q, visible, attention_quantiles(inputs.k, n_key))),
        ctypes.c_double(inputs.predictor_scale),
        ctypes.c_double(inputs.rest_scale),
        *map(address, (scores, counts, out)),
        torch.get_num_threads(),
    )
    return out


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
