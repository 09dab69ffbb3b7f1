"""Reads attention calls, whose conventions for masks differ between transformers' implementations.

Calls that do not attend by the softmax of :func:`normfree.attention_entropy`, with its soft-cap, bias and learned
sinks, are refused with the reason; nothing is guessed. Attention functions ignore keyword arguments that they do not
know, so an argument counts only for functions known to use it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from normfree.entropy import attention_entropy
from normfree.modeling.attention import compiled_attention_forward
from normfree.probes.interception import TORCH_SDPA, InterfaceCall
from normfree.probes.sequences import Sequence, sequences_of_lengths

REFUSED_ARGUMENTS = {
    "cache": "its keys are in a paged cache",
    "block_indices": "it attends to selected blocks of keys",
    "indices": "it attends to selected keys",
    "score_mod": "its scores are modified by a function",
    "block_table": "its keys are in a paged cache",
}
"""Arguments that change the attention weights, and the reason given."""

SCORING_ARGUMENTS = {
    "softcap": "soft-cap",
    "position_bias": "position bias",
    "s_aux": "learned attention sink",
    "sinks": "learned attention sink",
}
"""Names of arguments that change scores or normaliser in a known way; eager functions read ``s_aux`` off modules."""

SELECTING_ARGUMENTS = ("n_active",)
"""Arguments for the number of keys that a call selects by a rule of its own."""


class UnreadableCallError(Exception):
    """Queries, keys and mask of a call do not determine its attention weights; the message says why."""


@dataclass(frozen=True)
class Attention:
    """One attention as the arguments of :func:`normfree.attention_entropy`.

    weights: float32 or float64 [batch, n_head, n_query, n_key], if the attention function returned them; None with a
        learned sink, as functions differ in whether they then sum to 1.
    selects: it attends to some of the visible keys only, and only ``weights`` tell the distribution.
    sequences: those packed into the row, if the call names them.
    """

    q: Tensor
    k: Tensor
    scale: float
    is_causal: bool
    attention_mask: Tensor | None
    sliding_window: int | None
    weights: Tensor | None
    selects: bool = False
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    sequences: tuple[Sequence, ...] = ()

    def entropy(self) -> Tensor:
        """From queries and keys, differentiable: float32 [batch, n_head, n_query], nats."""
        return attention_entropy(
            self.q,
            self.k,
            scale=self.scale,
            is_causal=self.is_causal,
            attention_mask=self.attention_mask,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            bias=self.bias,
            sinks=self.sinks,
        )


@dataclass(frozen=True)
class _Masking:
    n_key: int
    is_causal: bool
    attention_mask: Tensor | None
    sliding_window: int | None = None
    sequences: tuple[Sequence, ...] = ()


def read_call(call: InterfaceCall) -> Attention:
    """The attention that a call computes; queries, keys, bias and sinks keep their gradients.

    Under autocast float32 queries and keys are rounded as the attention function rounds them.

    Raises:
        UnreadableCallError: with the reason.
    """
    for name, reason in REFUSED_ARGUMENTS.items():
        if call.others.get(name) is not None:
            raise UnreadableCallError(reason)
    if getattr(call.module, "compressor", None) is not None:  # DeepSeek-V4
        raise UnreadableCallError("it attends to compressed keys, which are no positions of the sequence")
    if call.n_positional:
        raise UnreadableCallError("it passes arguments behind the mask by place, so their meaning is not known")
    q, k = call.query, call.key
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0]:
        raise UnreadableCallError(f"its queries and keys have shapes {list(q.shape)} and {list(k.shape)}")

    read_masking = _read_eager if call.is_eager else _READERS.get(call.function)
    if read_masking is None:
        name = getattr(call.function, "__qualname__", repr(call.function))
        raise UnreadableCallError(f"the mask conventions of its attention function {name} are not known")
    masking = read_masking(call)
    _check_scoring(call)
    sinks = _sinks(call)
    scaling = call.others.get("scaling")
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k = (tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in (q, k))
    return Attention(
        q=q,
        k=k if masking.n_key == k.shape[2] else k[:, :, : masking.n_key],
        scale=float(scaling) if scaling is not None else q.shape[-1] ** -0.5,
        is_causal=masking.is_causal,
        attention_mask=masking.attention_mask,
        sliding_window=masking.sliding_window,
        weights=_weights(call) if sinks is None else None,
        selects=any(call.others.get(name) is not None for name in SELECTING_ARGUMENTS),
        softcap=_softcap(call),
        bias=_bias(call, masking.n_key),
        sinks=sinks,
        sequences=masking.sequences,
    )


def _check_scoring(call: InterfaceCall) -> None:
    """Checks that the attention function uses the soft-cap, bias and sinks of the call."""
    given = {name for name in SCORING_ARGUMENTS if call.others.get(name) is not None}
    if isinstance(getattr(call.module, "sinks", None), Tensor) and "sinks" not in given:
        given.add("s_aux")
    used = set(inspect.signature(call.function).parameters) if call.is_eager else _USES[call.function]
    code = getattr(inspect.unwrap(call.function), "__code__", None)
    if call.is_eager and code is not None and "sinks" in code.co_names:
        used.add("s_aux")  # as module.sinks
    for name in sorted(given - used):
        raise UnreadableCallError(f"it has a {SCORING_ARGUMENTS[name]} that its attention function does not take")


def _softcap(call: InterfaceCall) -> float | None:
    softcap = call.others.get("softcap")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise UnreadableCallError(f"its scores are soft-capped by {softcap}")
    return None if softcap is None else float(softcap)


def _bias(call: InterfaceCall, n_key: int) -> Tensor | None:
    bias = call.others.get("position_bias")
    if bias is None:
        return None
    shape = (*call.query.shape[:3], call.key.shape[2])
    fits = bias.dim() == 4 and all(size in (1, full) for size, full in zip(bias.shape, shape, strict=True))
    if not fits or not bias.is_floating_point():
        raise UnreadableCallError(f"its position bias has {bias.dtype} and shape {list(bias.shape)}")
    return bias if bias.shape[3] == 1 else bias[..., :n_key]


def _sinks(call: InterfaceCall) -> Tensor | None:
    """Logits of learned sinks, [n_head] or [batch or 1, n_head, n_query or 1]."""
    sinks = call.others.get("sinks")
    if sinks is not None and sinks.dim() == 4 and sinks.shape[3] == 1:
        sinks = sinks[..., 0]  # a column of the scores
    if sinks is None:
        sinks, own = call.others.get("s_aux"), getattr(call.module, "sinks", None)
        if call.is_eager and sinks is not None and sinks is not own:
            raise UnreadableCallError("it passes a learned attention sink that is not the one of its module")
        sinks = own if call.is_eager else sinks
    if sinks is None:
        return None
    if call.function is flash_attention_forward:
        sinks = sinks.to(call.query.dtype)
    batch, n_head, n_query = call.query.shape[:3]
    one_a_head = sinks.numel() == n_head == max(sinks.shape)
    if one_a_head:
        return sinks.reshape(n_head)
    if sinks.shape not in ((batch, n_head, n_query), (1, n_head, n_query)):
        raise UnreadableCallError(f"its learned attention sinks have shape {list(sinks.shape)}")
    return sinks


def _read_eager(call: InterfaceCall) -> _Masking:
    """The mask alone hides keys: without one every query sees every key."""
    return _Masking(call.key.shape[2], False, _dense_mask(call))


def _read_sdpa(call: InterfaceCall) -> _Masking:
    """Causal only without a mask, and aligned at the first key: later keys are the empty end of a static cache."""
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    is_causal = call.attention_mask is None and n_query > 1 and _asks_for_causal(call)
    return _Masking(min(n_key, n_query) if is_causal else n_key, is_causal, _dense_mask(call))


def _read_compiled(call: InterfaceCall) -> _Masking:
    """Causal, always."""
    return _Masking(call.key.shape[2], True, None)


def _read_torch_sdpa(call: InterfaceCall) -> _Masking:
    """``scaled_dot_product_attention`` itself: without causality or mask everything is visible."""
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    mask, is_causal = call.attention_mask, bool(call.others["is_causal"])
    if mask is not None:
        mask = mask.detach()
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        mask = mask.expand(*mask.shape[:3], n_key)
    return _Masking(min(n_key, n_query) if is_causal else n_key, is_causal, mask)


def _read_flash(call: InterfaceCall) -> _Masking:
    """Causality and window are the kernel's, aligned at the last key. The mask is a padding mask; without one, several
    sequences may be packed into one row.
    """
    mask = call.attention_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnreadableCallError("it gives flash attention a mask that is not a padding mask")
    n_key = call.key.shape[2]
    if mask is not None and mask.shape[1] < n_key:
        n_key = mask.shape[1]
    sequences = _packed_for_flash(call) if mask is None else ()
    mask = None if mask is None else mask[:, -n_key:].bool()
    return _Masking(n_key, _asks_for_causal(call), mask, call.others.get("sliding_window"), sequences)


def _packed_for_flash(call: InterfaceCall) -> tuple[Sequence, ...]:
    """Sequences as transformers finds them: by all of four arguments, or position ids of one row that restart."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    position_ids = call.others.get("position_ids")
    if all(call.others.get(name) is not None for name in names):
        of_queries, of_keys = (call.others[name] for name in names[:2])
    elif _is_packed_sequence(position_ids, call.query.shape[0]):
        (of_queries, of_keys), _ = prepare_fa_kwargs_from_position_ids(position_ids)
    else:
        return ()
    n_row, _, n_query = call.query.shape[:3]
    if n_row != 1 or n_query != call.key.shape[2] or not torch.equal(of_queries, of_keys):
        raise UnreadableCallError(
            "several sequences are packed into one row, of a batch of several rows or with more keys than queries"
        )
    return sequences_of_lengths(of_queries)


def _read_flex(call: InterfaceCall) -> _Masking:
    """A block mask holds causality and padding; a tensor is added to the scores; without either all is visible."""
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    mask = call.attention_mask
    if isinstance(mask, BlockMask):
        dense = create_mask(mask.mask_mod, mask.shape[0], mask.shape[1], n_query, n_key, device=call.query.device.type)
        return _Masking(n_key, False, dense)
    if mask is not None:
        return _Masking(n_key, False, mask[:, :1, :, :n_key])
    return _Masking(n_key, False, None)


def _weights(call: InterfaceCall) -> Tensor | None:
    """Weights of an eager call, unless they were rounded to half precision."""
    weights, shape = call.weights, (*call.query.shape[:3], call.key.shape[2])
    fits = call.is_eager and isinstance(weights, Tensor) and weights.shape == shape
    return weights if fits and weights.dtype in (torch.float32, torch.float64) else None


def _dense_mask(call: InterfaceCall) -> Tensor | None:
    mask = call.attention_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        raise UnreadableCallError("its mask is not a tensor [batch, n_head or 1, n_query, n_key]")
    return mask.detach() if mask is not None and mask.requires_grad else mask


def _asks_for_causal(call: InterfaceCall) -> bool:
    is_causal = call.others.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if is_causal is None else is_causal)


_READERS: Mapping[Callable[..., Any], Callable[[InterfaceCall], _Masking]] = {
    sdpa_attention_forward: _read_sdpa,
    compiled_attention_forward: _read_compiled,
    flash_attention_forward: _read_flash,
    flex_attention_forward: _read_flex,
    TORCH_SDPA: _read_torch_sdpa,
}

_USES: Mapping[Callable[..., Any], set[str]] = {
    sdpa_attention_forward: {"position_bias"},
    compiled_attention_forward: set(),
    flash_attention_forward: {"softcap", "s_aux"},
    flex_attention_forward: {"softcap", "position_bias", "s_aux"},
    TORCH_SDPA: set(),
}
"""The ``SCORING_ARGUMENTS`` that attention functions use; they ignore the others."""
