"""Finds the queries that are padding, from the mask alone."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.entropy.visibility import Visibility
from normfree.probes.sequences import elements_per_row


class UnclearPaddingError(Exception):
    """A sparse mask hides own keys of queries as padding would."""


def first_own_key(visibility: Visibility, start: int) -> int:
    """The key of query 0, which is at position ``start``; those of the others follow.

    If a cache has dropped old keys, or never had them, the queries' own keys are the last ones.
    """
    return min(start, visibility.n_key - visibility.n_query)


def valid_queries(visibility: Visibility, start: int, *, is_causal: bool) -> Tensor:
    """Bool [batch, n_query]: queries that see their own key, and so are no padding.

    A query of cross-attention has no own key, and is valid if it sees any. Masks of sparse attention may hide own keys:
    there a query is valid if any other sees its key.

    Args:
        visibility: of the whole call.
        start: the position of the first query.
        is_causal: the module attends to earlier tokens only.

    Raises:
        UnclearPaddingError: a mask of sparse attention hides the key of a query from all, or a mask hides the own key
            of the only query.
    """
    batch, n_query, n_key = visibility.batch_and_heads[0], visibility.n_query, visibility.n_key
    if visibility.allowed is None:
        return torch.ones(batch, n_query, dtype=torch.bool, device=visibility.device)
    if not is_causal and n_query != n_key:
        return (visibility.counts > 0).any(1).expand(batch, n_query)
    offset = first_own_key(visibility, start)
    sees_own = _sees_own_key(visibility, offset)
    if n_query == 1:
        if bool((~sees_own & (visibility.counts > 0).any(1)).any()):
            raise UnclearPaddingError
        return sees_own.expand(batch, n_query)
    if bool(sees_own.all()):
        valid = sees_own & ~_is_padding_that_sees_itself(visibility, offset)
        return valid.expand(batch, n_query)
    if not _has_holes(visibility, offset):
        return sees_own.expand(batch, n_query)
    is_seen = _seen_keys(visibility)[:, offset : offset + n_query]
    if bool((~is_seen & (visibility.counts > 0).any(1)).any()):
        raise UnclearPaddingError
    return (sees_own | is_seen).expand(batch, n_query)


def _sees_own_key(visibility: Visibility, offset: int) -> Tensor:
    """Bool [batch or 1, n_query]: by any head."""
    allowed = visibility.allowed
    assert allowed is not None
    own_key = torch.arange(visibility.n_query, device=visibility.device) + offset
    index = own_key[None, None, :, None].expand(*allowed.shape[:2], -1, 1)
    if allowed.shape[2] == 1:
        sees_own = allowed[:, :, 0].gather(-1, index[..., 0])
    else:
        sees_own = allowed.gather(-1, index)[..., 0]
    return sees_own.any(1)


def _seen_keys(visibility: Visibility) -> Tensor:
    """Bool [batch or 1, n_key]: keys that any query sees by any head."""
    parts = []
    for block in visibility.blocks(elements_per_row(visibility)):
        assert block.allowed is not None
        seen = block.allowed.any(1).any(1)
        parts.append(torch.nn.functional.pad(seen, (block.columns.start, visibility.n_key - block.columns.stop)))
    return torch.stack(parts).any(0)


def _has_holes(visibility: Visibility, offset: int) -> bool:
    """True if a query misses a key that another query sees, after its first visible key and before its own.

    Causality, windows, chunks, packing and padding make no such holes.
    """
    seen = _seen_keys(visibility)
    for block in visibility.blocks(elements_per_row(visibility)):
        assert block.allowed is not None
        n_row = block.rows.stop - block.rows.start
        # by head: heads that choose different keys would fill each other's holes
        allowed = block.allowed.expand(-1, -1, n_row, -1)
        after_first = allowed.cumsum(-1) > 0
        own = torch.arange(block.rows.start, block.rows.stop, device=visibility.device)[:, None] + offset
        key = torch.arange(block.columns.start, block.columns.stop, device=visibility.device)
        if bool((after_first & ~allowed & (key < own) & seen[:, None, None, block.columns]).any()):
            return True
    return False


def _is_padding_that_sees_itself(visibility: Visibility, offset: int) -> Tensor:
    """Bool [batch or 1, n_query]: padding, if every query sees its own key and all see the same others (XLNet)."""
    allowed = visibility.allowed
    assert allowed is not None
    none = torch.zeros(1, visibility.n_query, dtype=torch.bool, device=visibility.device)
    if visibility.is_causal or visibility.sliding_window is not None or visibility.n_query != visibility.n_key:
        return none
    seen = allowed.any(1).expand(-1, visibility.n_query, -1)
    own = torch.eye(visibility.n_query, dtype=torch.bool, device=visibility.device)
    by_others = (seen & ~own).any(1)
    if bool((seen & ~own).triu().any()) and torch.equal(seen, by_others[:, None] | own):
        return ~by_others
    return none
