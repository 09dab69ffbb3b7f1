"""Attention output and entropy in one call, for code that computes attention itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from normfree.entropy.fused import entropy_and_attended, prepared, select, triton_refuses, whole_lse
from normfree.entropy.reference import block_scores, distribution
from normfree.entropy.scoring import Scoring, check_sinks, join_sinks, scoring_of
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
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(output, entropy)`` of softmax attention.

    Without gradients, the triton backend computes both in one pass. Otherwise the output is that of torch's
    ``scaled_dot_product_attention`` and the entropy that of :func:`normfree.attention_entropy`, both differentiable.
    Soft-capped scores and learned biases take blocks of materialised scores, which the gradient keeps: T² memory.

    Args:
        q, k: as in :func:`normfree.attention_entropy`, as are all the options.
        v: values [batch, n_kv_head, n_key, value_dim], of the dtype of q and k.

    Returns:
        Output [batch, n_head, n_query, value_dim] in the dtype of v, where learned sinks have no value; and entropy,
        float32 [batch, n_head, n_query], nats. A query that sees no key has output 0 and entropy NaN; one that meets a
        non-finite score has entropy NaN.

    Raises:
        InputError: as :func:`normfree.attention_entropy`, and for values that do not fit the keys.
    """
    visibility = visibility_of(
        q, k, is_causal=is_causal, attention_mask=attention_mask, sliding_window=sliding_window, bias=bias
    )
    _check_values(q, k, v)
    scoring = scoring_of(q, scale, softcap)
    sinks = None if sinks is None else check_sinks(sinks, q)
    name = select(q, k, scoring, visibility) if backend == "auto" else backend
    learns = any(each is not None and each.requires_grad for each in (q, k, v, visibility.bias, sinks))
    with torch.autocast(q.device.type, enabled=False):
        in_one_pass = name == "triton" and not (learns and torch.is_grad_enabled())
        if in_one_pass and triton_refuses(v, k, scoring, visibility) is None:
            return _in_one_pass(q, k, v, scoring, visibility, sinks)
        entropy, attended = entropy_and_attended(q, k, scoring, visibility, sinks, name)
        output = _attend(q, k, v, scoring, visibility)
        return output if attended is None else _kept(output, attended), entropy


def _in_one_pass(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visibility: Visibility, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    from normfree.entropy.triton_launch import fused_attention_and_entropy

    q, k, centre = prepared(q, k, scoring, "triton")
    output, entropy, lse = fused_attention_and_entropy(q, k, v, scoring.scale, visibility)
    if sinks is None:
        return output, entropy
    entropy, attended = join_sinks(entropy, whole_lse(lse, q, centre, scoring), sinks)
    return _kept(output, attended), entropy


def _kept(output: Tensor, attended: Tensor) -> Tensor:
    """Output of attention to the keys alone, scaled by the share that learned sinks leave to them."""
    return (output * attended[..., None]).to(output.dtype)


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


def _attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visibility: Visibility) -> Tensor:
    """Attention to the keys, in blocks of query rows unless torch's own causality says what is visible."""
    has_mask = visibility.allowed is not None or visibility.bias is not None
    is_square_causal = visibility.sliding_window is None and visibility.n_query == visibility.n_key
    if scoring.softcap is None and not has_mask and (visibility.has_full_rows or is_square_causal):
        causal = not visibility.has_full_rows
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scoring.scale, enable_gqa=True)
    # torch's fused kernels know no soft-cap, and not all of them give masks a gradient
    bias_learns = visibility.bias is not None and visibility.bias.requires_grad
    attend = _attend_block if scoring.softcap is None and not bias_learns else _attend_scores
    blocks = visibility.blocks(q.shape[0] * q.shape[1] * visibility.n_key)
    outputs = [attend(q, k, v[:, :, block.columns], scoring, block) for block in blocks]
    sees_nothing = (visibility.counts == 0)[..., None]
    return torch.cat(outputs[::-1], dim=2).masked_fill(sees_nothing, 0.0)


def _attend_block(q: Tensor, k: Tensor, values: Tensor, scoring: Scoring, block: Block) -> Tensor:
    mask = block.allowed
    if block.bias is not None:
        bias = block.bias.to(q.dtype)
        mask = bias if block.allowed is None else bias.masked_fill(~block.allowed, -torch.inf)
    rows, keys = q[:, :, block.rows], k[:, :, block.columns]
    return scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scoring.scale, enable_gqa=True)


def _attend_scores(q: Tensor, k: Tensor, values: Tensor, scoring: Scoring, block: Block) -> Tensor:
    """From materialised scores, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    p = distribution(block_scores(q.to(wide), k.to(wide), scoring, block), block.allowed).p
    batch, n_kv_head, n_column, value_dim = values.shape
    output = p.reshape(batch, n_kv_head, -1, n_column) @ values.to(wide)
    return output.view(batch, q.shape[1], -1, value_dim).to(values.dtype)
