"""Attention's output and its entropy in one call, for code that computes attention itself and watches it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from normfree.entropy.fused import entropy_by_parts, prepared, select, triton_refuses
from normfree.entropy.visibility import Block, Visibility, visibility_of
from normfree.errors import InputError


def attention_and_entropy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(output, entropy)`` of softmax attention.

    With the triton backend, and where no gradient is asked for, one kernel computes both in one pass. Otherwise
    the output is that of torch's ``scaled_dot_product_attention`` and the entropy that of
    :func:`normfree.attention_entropy`: two calls, and both have gradients.

    Args:
        q, k: as in :func:`normfree.attention_entropy`, as are all the options.
        v: values [batch, n_kv_head, n_key, value_dim], of the dtype of q and k.

    Returns:
        Output [batch, n_head, n_query, value_dim] in the dtype of v, zeros for a query that sees no key; and entropy,
        float32 [batch, n_head, n_query], nats, NaN for such a query and for one that meets a non-finite score.

    Raises:
        InputError: as :func:`normfree.attention_entropy`, and for values that do not fit the keys.
    """
    visibility = visibility_of(q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window)
    _check_values(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = select(q, k, visibility) if backend == "auto" else backend
    has_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if name == "triton" and not has_gradient and triton_refuses(v, k, visibility) is None:
            from normfree.entropy.triton import fused_attention_and_entropy

            return fused_attention_and_entropy(*prepared(q, k, name), v, scale, visibility)
        entropy = entropy_by_parts(q, k, scale, visibility, name)
        return _attend(q, k, v, scale, visibility), entropy


def _check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise InputError(
            f"v must be [batch, n_kv_head, n_key, value_dim] = {[*k.shape[:3], 'value_dim']}, got {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or q.device != v.device:
        raise InputError(
            f"q, k and v must have one dtype and be on one device, got {q.dtype}, {k.dtype} and {v.dtype} "
            f"on {q.device}, {k.device} and {v.device}"
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visibility: Visibility) -> Tensor:
    """Attention, in blocks of query rows where torch's own causality does not say what is visible."""
    has_mask = visibility.allowed is not None or visibility.bias is not None
    is_square_causal = visibility.sliding_window is None and visibility.n_query == visibility.n_key
    if not has_mask and (visibility.has_full_rows or is_square_causal):
        causal = not visibility.has_full_rows
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    outputs = []
    for block in visibility.blocks(q.shape[0] * q.shape[1] * visibility.n_key):
        keys, values = k[:, :, block.columns], v[:, :, block.columns]
        mask = _dense_mask(block, q.dtype)
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, block.rows], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
        )
    sees_nothing = (visibility.counts == 0)[..., None]
    return torch.cat(outputs[::-1], dim=2).masked_fill(sees_nothing, 0.0)


def _dense_mask(block: Block, dtype: torch.dtype) -> Tensor | None:
    if block.bias is None:
        return block.allowed
    bias = block.bias.to(dtype)
    return bias if block.allowed is None else bias.masked_fill(~block.allowed, -torch.inf)
