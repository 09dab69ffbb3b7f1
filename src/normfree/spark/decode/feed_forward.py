# ruff: noqa: N803 (the paper's names of matrices)
"""The Spark FFN for a few queries, reading only the rows of active neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.spark.decode import extension, torch_kernels
from normfree.spark.decode.backends import chosen_backend
from normfree.spark.decode.shapes import Activation, FeedForwardInputs, check_feed_forward


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
        V: output [d_ff, d]. Of all three, the layout of :func:`pack_feed_forward`.
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
    inputs = check_feed_forward(FeedForwardInputs(q, K1, K2, V, 0, activation, predictor_bias, rest_bias), k)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _kernel(chosen_backend(backend, q), inputs).to(q.dtype)


def _kernel(backend: str, inputs: FeedForwardInputs) -> Tensor:
    if backend == "triton":
        from normfree.spark.decode import triton

        return triton.feed_forward(inputs)
    return extension.feed_forward(inputs) if backend == "cpu" else torch_kernels.feed_forward(inputs)
