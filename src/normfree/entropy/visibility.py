"""The keys that each query may attend to: causality, sliding window and attention mask in one object.

The T×T mask is never built: windows and causal triangles are written out only for a block of query rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from normfree.errors import InputError

BLOCK_ELEMENTS = 2**22
"""Most elements of a block of scores (16 MiB in float32), unless ``MIN_BLOCK_ROWS`` need more."""

MIN_BLOCK_ROWS = 16


class Block(NamedTuple):
    """Some query rows, the keys that any of them may see, and the mask between the two.

    ``allowed`` (bool; None allows all) and ``bias`` (float, added to the scores, or None) are broadcastable to [batch,
    n_head, rows, columns].
    """

    rows: slice
    columns: slice
    allowed: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Visibility:
    """The visible keys of every query of one attention call; made by :func:`visibility_of`.

    ``allowed``, a bool mask on top of causality and window, and ``bias``, floats added to the scores of visible keys,
    are broadcastable to [batch, n_head, n_query, n_key], or None. ``first`` and ``last`` are those of
    :func:`visible_range`.
    """

    n_query: int
    n_key: int
    is_causal: bool
    sliding_window: int | None
    first: Tensor
    last: Tensor
    allowed: Tensor | None
    bias: Tensor | None
    device: torch.device
    batch_and_heads: tuple[int, int]

    @property
    def has_full_rows(self) -> bool:
        """True if causality and window hide no key from any query."""
        return self.sliding_window is None and (not self.is_causal or self.n_query == 1)

    def blocks(self, elements_per_row: int) -> Iterator[Block]:
        """All query rows, the last first, in blocks whose scores, ``elements_per_row`` a row, fit ``BLOCK_ELEMENTS``.

        Under causality the last rows see the most keys, and later blocks fit into the memory that they free. In the
        other order each block would need new memory from the system.
        """
        n_row = BLOCK_ELEMENTS // elements_per_row
        if self.sliding_window is not None:
            # longer blocks would mostly hold keys outside the window
            n_row = min(n_row, self.sliding_window)
        n_row = max(MIN_BLOCK_ROWS, n_row)
        for start in reversed(range(0, self.n_query, n_row)):
            yield self.block(start, min(start + n_row, self.n_query))

    def block(self, start: int, stop: int) -> Block:
        """Query rows ``start`` to ``stop`` (exclusive)."""
        rows = slice(start, stop)
        columns, allowed = self.columns(rows), None
        if not self.has_full_rows:
            key = torch.arange(columns.start, columns.stop, device=self.device)
            first, last = self.first[rows, None].to(self.device), self.last[rows, None].to(self.device)
            allowed = ((key >= first) & (key < last))[None, None]
        if self.allowed is not None:
            given = _rows_of(self.allowed, rows)[..., columns]
            allowed = given if allowed is None else allowed & given
        bias = None if self.bias is None else _rows_of(self.bias, rows)[..., columns]
        return Block(rows, columns, allowed, bias)

    def with_bias(self, bias: Tensor) -> Visibility:
        """A copy with ``bias`` added to the scores, on top of what a float mask adds.

        bias: floating-point, broadcastable to [batch, n_head, n_query, n_key]; it keeps its gradient. Entries at or
            below half the most negative finite number of its dtype hide the key.

        Raises:
            InputError: its shape, dtype or device do not fit.
        """
        wanted = (*self.batch_and_heads, self.n_query, self.n_key)
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if len(shape) > 4 or any(size not in (1, full) for size, full in zip(shape, wanted, strict=True)):
            raise InputError(
                f"bias must be broadcastable to [batch, n_head, n_query, n_key] = {list(wanted)}, "
                f"got shape {list(bias.shape)}"
            )
        if not bias.is_floating_point():
            raise InputError(f"bias must have a floating-point dtype, got {bias.dtype}; hide keys by attention_mask")
        if bias.device != self.device:
            raise InputError(f"bias is on {bias.device} and q on {self.device}; put them on one device")
        bias = bias.reshape(shape)
        bias = bias.expand(*shape[:3], self.n_key) if shape[3] == 1 else bias
        hidden = hides(bias.detach())
        allowed = self.allowed
        if hidden.any():
            allowed = ~hidden if allowed is None else allowed & ~hidden
            bias = bias.masked_fill(hidden, 0.0)
        # a sum in half precision would round both
        return replace(self, allowed=allowed, bias=bias if self.bias is None else self.bias.double() + bias.double())

    def of_sequences(self, some: slice) -> Visibility:
        """A copy for some sequences of the batch."""
        allowed, bias = (
            mask if mask is None or mask.shape[0] == 1 else mask[some] for mask in (self.allowed, self.bias)
        )
        batch = len(range(*some.indices(self.batch_and_heads[0])))
        return replace(self, allowed=allowed, bias=bias, batch_and_heads=(batch, self.batch_and_heads[1]))

    def columns(self, rows: slice) -> slice:
        """The keys that causality and window leave to any of ``rows``."""
        return slice(int(self.first[rows.start]), int(self.last[rows.stop - 1]))

    @cached_property
    def counts(self) -> Tensor:
        """The number of visible keys of every query: int64, broadcastable to [batch, n_head, n_query]."""
        first, last = self.first.to(self.device), self.last.to(self.device)
        if self.allowed is None:
            return (last - first)[None, None]
        if self.allowed.shape[2] == 1:
            before = torch.nn.functional.pad(self.allowed[:, :, 0].cumsum(-1), (1, 0))
            return before[..., last] - before[..., first]
        n_mask = self.allowed.shape[0] * self.allowed.shape[1]
        counted = []
        for block in self.blocks(n_mask * self.n_key):
            assert block.allowed is not None
            counted.append(block.allowed.sum(-1))
        return torch.cat(counted[::-1], dim=-1)

    def sees(self, key: Tensor) -> Tensor:
        """Bool, broadcastable to [batch, n_head, n_query]: sees ``key``, int64 [batch or 1, n_head or 1]."""
        first, last = self.first.to(self.device), self.last.to(self.device)
        seen = (key[..., None] >= first) & (key[..., None] < last)
        if self.allowed is None:
            return seen
        index = key[..., None, None].expand(*self.allowed.shape[:3], 1)
        return seen & self.allowed.gather(-1, index)[..., 0]

    def first_key(self) -> Tensor:
        """The first key that any query sees, int64 [batch or 1, n_head or 1]; 0 if none is seen."""
        if self.allowed is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self.allowed.any(2).to(torch.uint8).argmax(-1)


def hides(added: Tensor) -> Tensor:
    """Which numbers that are added to scores hide a key: -inf, or the most negative finite one of the dtype, as in
    transformers, or of a narrower dtype that it was raised from (bfloat16 and float32).
    """
    return added <= max(torch.finfo(added.dtype).min, torch.finfo(torch.float32).min) / 2


def visible_range(n_query: int, n_key: int, *, is_causal: bool, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) key of each query by causality and window alone: int64 [n_query], on CPU.

    The queries are the last ``n_query`` positions of the keys'. A window of W shows the query itself, W - 1 positions
    before it, and without causality W - 1 after it.
    """
    if (is_causal or sliding_window is not None) and n_query > n_key:
        raise InputError(
            f"causal or windowed attention of {n_query} queries to {n_key} keys: the queries are the last "
            "positions of the keys', so there must be at least as many keys; for cross attention pass "
            "is_causal=False and no sliding_window"
        )
    if sliding_window is not None and sliding_window < 1:
        raise InputError(f"sliding_window must be at least 1 key, got {sliding_window}; pass None for no window")
    position = torch.arange(n_query) + (n_key - n_query)
    first, last = torch.zeros_like(position), torch.full_like(position, n_key)
    if sliding_window is not None:
        first = (position - sliding_window + 1).clamp(0, n_key)
        last = (position + sliding_window).clamp(0, n_key)
    if is_causal:
        last = position + 1
    return first, last


def visibility_of(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    bias: Tensor | None = None,
) -> Visibility:
    """The visible keys of every query, with all inputs checked.

    q [batch, n_head, n_query, head_dim]; k [batch, n_kv_head, n_key, head_dim]; ``attention_mask`` and ``bias`` as in
    :func:`normfree.entropy.attention_entropy`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together.
    """
    _check_query_and_key(q, k)
    n_query, n_key = q.shape[2], k.shape[2]
    first, last = visible_range(n_query, n_key, is_causal=is_causal, sliding_window=sliding_window)
    allowed = mask_bias = None
    if attention_mask is not None:
        allowed, mask_bias = _split_mask(attention_mask, q, n_key)
        causal_last = torch.arange(1, n_query + 1) + (n_key - n_query)
        if allowed is not None and n_query <= n_key and _is_causal_mask(allowed, causal_last):
            # a causal mask is dropped: kernels know causality
            allowed, is_causal, last = None, True, torch.minimum(last, causal_last)
    # a window that holds all keys is none, for kernels that know no windows
    window = sliding_window if sliding_window is not None and sliding_window < n_key else None
    shape = (q.shape[0], q.shape[1])
    visibility = Visibility(n_query, n_key, is_causal, window, first, last, allowed, mask_bias, q.device, shape)
    return visibility if bias is None else visibility.with_bias(bias)


def _check_query_and_key(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise InputError(f"{name} must be non-empty, [batch, n_head, T, head_dim], got shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1] != 0:
        raise InputError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch (dim 0) and head_dim (dim 3), and "
            "n_head (dim 1 of q) must be a multiple of n_kv_head (dim 1 of k)"
        )
    if q.device != k.device:
        raise InputError(f"q is on {q.device} and k on {k.device}; put them on one device")


def _split_mask(mask: Tensor, q: Tensor, n_key: int) -> tuple[Tensor | None, Tensor | None]:
    """``(allowed, bias)`` of a mask; the bias is None where the mask only hides keys."""
    batch, n_head, n_query = q.shape[:3]
    if mask.requires_grad:
        raise InputError("attention_mask requires a gradient, which entropy does not give; detach() it")
    if mask.dim() == 2:
        if mask.shape != (batch, n_key) or mask.is_floating_point():
            raise InputError(
                "a 2-D attention_mask is a padding mask, bool or integer [batch, n_key] = "
                f"[{batch}, {n_key}], got {mask.dtype} {list(mask.shape)}"
            )
        return mask.to(q.device, torch.bool)[:, None, None, :], None
    wanted = (batch, n_head, n_query)
    fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, wanted, strict=False))
    if not fits or mask.shape[3] != n_key:
        raise InputError(
            f"attention_mask must be broadcastable to [batch, n_head, n_query, n_key] = "
            f"{[*wanted, n_key]} with all keys written out, got shape {list(mask.shape)}"
        )
    # models have one mask for all sequences, expanded or repeated: read it once
    for dim, stride in enumerate(mask.stride()[:2]):
        first = mask.narrow(dim, 0, 1)
        mask = first if stride == 0 or (mask.shape[dim] > 1 and torch.equal(first.expand_as(mask), mask)) else mask
    mask = mask.narrow(2, 0, 1) if mask.stride(2) == 0 else mask
    mask = mask.to(q.device)
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise InputError(f"a 4-D attention_mask must be bool (True = attend) or float (added), got {mask.dtype}")
    allowed = ~hides(mask)
    has_bias = bool(((mask != 0) & allowed).any())
    return allowed, mask if has_bias else None


def _is_causal_mask(allowed: Tensor, last: Tensor) -> bool:
    """True if a mask [batch or 1, n_head or 1, n_query or 1, n_key] is causality alone: keys below ``last`` allowed."""
    if allowed.shape[2] != len(last):
        return False
    key = torch.arange(allowed.shape[3], device=allowed.device)
    n_row = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // allowed[:, :, 0].numel())
    return all(
        bool((rows == (key < last_key[:, None])).all())
        for rows, last_key in zip(allowed.split(n_row, dim=2), last.to(key.device).split(n_row), strict=True)
    )


def _rows_of(mask: Tensor, rows: slice) -> Tensor:
    """Query rows of a mask, whose query dim may be 1 for all rows."""
    return mask if mask.shape[2] == 1 else mask[:, :, rows]
