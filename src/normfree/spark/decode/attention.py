"""Spark attention for one query a sequence, reading only the keys and values of tokens that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.spark.decode import extension, torch_kernels
from normfree.spark.decode.backends import chosen_backend
from normfree.spark.decode.shapes import AttentionInputs, check_attention


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
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _kernel(chosen_backend(backend, q), inputs).to(q.dtype)


def _kernel(backend: str, inputs: AttentionInputs) -> Tensor:
    if backend == "triton":
        from normfree.spark.decode import triton

        return triton.attention(inputs)
    return extension.attention(inputs) if backend == "cpu" else torch_kernels.attention(inputs)
