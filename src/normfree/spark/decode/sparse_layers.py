# ruff: noqa: N803 (the paper's names of matrices)
"""Spark layers for a few queries, reading only active neurons and the keys and values of kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from normfree.spark.decode.backends import PREDICTOR_BY_NEURON, chosen_backend, kernels
from normfree.spark.decode.shapes import (
    Activation,
    AttentionInputs,
    FeedForwardInputs,
    PackedFeedForward,
    check_attention,
    check_feed_forward,
)

Inputs = TypeVar("Inputs", FeedForwardInputs, AttentionInputs)


def pack_feed_forward(K1: Tensor, K2: Tensor, V: Tensor, *, backend: str = "auto") -> PackedFeedForward:
    """K1 [r, d_ff], K2 [d - r, d_ff] and V [d_ff, d] in the layout of a backend; what has it already is not copied.

    Of ``nn.Linear`` weights, K1 and K2 are the transposes of the weights [d_ff, r] and [d_ff, d - r], V is the
    transpose of the weight [d, d_ff]: V is copied, and K1 for every backend but ``cpu``.

    Raises:
        InputError: the backend is unknown or cannot be used.
    """
    by_neuron = chosen_backend(backend, K1) in PREDICTOR_BY_NEURON
    K1 = K1.t().contiguous().t() if by_neuron else K1.contiguous()
    return PackedFeedForward(K1, K2.t().contiguous().t(), V.contiguous())


def sparse_feed_forward(
    q: Tensor,
    K1: Tensor,
    K2: Tensor,
    V: Tensor,
    k: int | float,
    activation: Activation,
    *,
    predictor_bias: Tensor | None = None,
    rest_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Vᵀ (σ(Statistical-Top_k(K1ᵀ q[:r])) ⊙ (K2ᵀ q[r:])) for each query ("Spark Transformer", Section 2.1).

    Of K2 and V only the rows of neurons above the threshold are read: about k of them, but any number from none to all
    is right. A query whose scores hold a NaN or an infinity has a row of NaN. Sums are float32 at least. Has no
    gradient.

    Args:
        q: queries [n, d]; made for small n, as each reads its own rows of K2 and V.
        K1: predictor [r, d_ff], in the dtype of q, as are K2 and V.
        K2: multiplier [d - r, d_ff].
        V: output [d_ff, d]. Of all three, the layout of :func:`pack_feed_forward` for this backend.
        k: neurons to keep, 1 to d_ff, or a share in (0, 1]; all of them means no threshold.
        activation: σ, elementwise and with σ(0) = 0.
        predictor_bias, rest_bias: [d_ff], added to K1ᵀ q[:r] and K2ᵀ q[r:].
        backend: ``torch``, ``cpu`` (compiled kernels: float32 and bfloat16), ``triton`` (NVIDIA GPUs) or ``auto``:
            the fastest for these inputs that :func:`decode_backends` has.

    Returns:
        [n, d] in the dtype of q.

    Raises:
        InputError: shapes, dtypes, devices or layouts that do not fit, k out of range, a backend that is unknown or
            cannot be used.
    """
    inputs = FeedForwardInputs(q, K1, K2, V, 0, activation, predictor_bias, rest_bias)
    name = chosen_backend(backend, q)
    inputs = check_feed_forward(inputs, k, predictor_by_neuron=name in PREDICTOR_BY_NEURON)
    return _without_autograd(kernels(name).feed_forward, inputs).to(q.dtype)


def sparse_attention_decode(
    q: Tensor,
    predictor_keys: Tensor,
    rest_keys: Tensor,
    values: Tensor,
    k: int | float,
    *,
    predictor_scale: float = 1.0,
    rest_scale: float = 1.0,
    visible: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Σ_j softmax_j(kept predictor scores) · softplus(q[r:]·k_j[r:]) · v_j ("Spark Transformer", Section 2.2).

    The predictor scores q[:r]·k_j[:r] of all visible tokens are thresholded by statistical top-k
    (:func:`~normfree.spark.statistical_topk_mask` says what it keeps: about k tokens, the largest always); the rest
    of the keys, and the values, are read for the tokens that are kept. Sums are float32 at least. Has no gradient.

    Args:
        q: one query a head [batch, n_head, head_dim].
        predictor_keys: the first r dimensions of the keys [batch, n_kv_head, n_key, r], in the dtype of q, as are the
            others; n_head must be a multiple of n_kv_head.
        rest_keys: the other dimensions [batch, n_kv_head, n_key, head_dim - r].
        values: [batch, n_kv_head, n_key, value_dim]. Keys and values may be views of longer buffers; where the rows of
            a head's tokens do not follow each other, they are copied.
        k: tokens to keep, or a share in (0, 1] of the visible ones.
        predictor_scale, rest_scale: factors on the two products.
        visible: bool [batch, n_key], False for padding; default: every token is seen.
        backend: as in :func:`sparse_feed_forward`.

    Returns:
        [batch, n_head, value_dim] in the dtype of q; NaN for a sequence without a visible token.

    Raises:
        InputError: as :func:`sparse_feed_forward`.
    """
    inputs = AttentionInputs(q, predictor_keys, rest_keys, values, k, visible, predictor_scale, rest_scale)
    inputs = check_attention(inputs)
    return _without_autograd(kernels(chosen_backend(backend, q)).attention, inputs).to(q.dtype)


def _without_autograd(kernel: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """``kernel(inputs)`` without gradients and autocast; where both are off already, without the cost of contexts."""
    kind = inputs.q.device.type
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(kind)):
        return kernel(inputs)
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        return kernel(inputs)
