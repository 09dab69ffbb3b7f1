"""Sequences packed into one row of a batch: which queries and keys belong together."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from normfree.entropy.visibility import Visibility


class Sequence(NamedTuple):
    """Queries and keys ``start`` to ``stop`` (exclusive) of row ``row`` of the batch."""

    row: int
    start: int
    stop: int


class EntangledSequencesError(Exception):
    """Sequences begin inside a row, and later queries see keys before them."""


def packed_sequences(
    visibility: Visibility, valid: Tensor, first_own_key: int, chunk: int | None
) -> tuple[Sequence, ...]:
    """The sequences of a call whose mask packs several into one row; () if every row is one sequence.

    A sequence begins at a query that sees its own key and none before it, by any head.

    Args:
        visibility: of self-attention.
        valid: bool [batch, n_query], the queries that are no padding.
        first_own_key: the key of query 0; those of the others follow.
        chunk: chunk size of chunked attention, whose chunks are no sequences.

    Raises:
        EntangledSequencesError: a query would see keys of another sequence, or the sequences began before this call.
    """
    if visibility.allowed is None or visibility.n_query == 1:
        return ()
    first, last = (each.expand(valid.shape) for each in _visible_ends(visibility))
    position = torch.arange(visibility.n_query, device=visibility.device) + first_own_key
    begins = valid & (first == position)
    inside = begins & (valid.cumsum(-1) > 1)
    if chunk is not None:
        first_valid = valid.long().argmax(-1, keepdim=True) + first_own_key
        inside &= (position - first_valid) % chunk != 0
    if not bool(inside.any()):
        return ()
    sequences = _sequences(inside | (begins & (valid.cumsum(-1) == 1)), valid)
    start, stop = torch.zeros_like(first), torch.zeros_like(first)
    for row, begin, end in sequences:
        start[row, begin:end], stop[row, begin:end] = begin, end
    if first_own_key > 0 or bool((((first < start) | (last >= stop)) & valid).any()):
        raise EntangledSequencesError
    return tuple(sequences)


def sequences_of_lengths(cumulative: Tensor) -> tuple[Sequence, ...]:
    """Sequences of one row, from their cumulative lengths, int [n + 1] from 0."""
    ends = cumulative.tolist()
    return tuple(Sequence(0, start, stop) for start, stop in pairwise(ends) if stop > start)


def elements_per_row(visibility: Visibility) -> int:
    """Elements of the mask per query, over the sequences and heads that it tells apart."""
    assert visibility.allowed is not None
    return visibility.allowed.shape[0] * visibility.allowed.shape[1] * visibility.n_key


def _visible_ends(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """First and last key that each query sees by any head, int64 [batch or 1, n_query] each."""
    first, last = [], []
    for block in visibility.blocks(elements_per_row(visibility)):
        assert block.allowed is not None
        n_row = block.rows.stop - block.rows.start
        seen = block.allowed.any(1).expand(-1, n_row, -1).to(torch.uint8)
        first.append(block.columns.start + seen.argmax(-1))
        last.append(block.columns.stop - 1 - seen.flip(-1).argmax(-1))
    return torch.cat(first[::-1], dim=-1), torch.cat(last[::-1], dim=-1)


def _sequences(begins: Tensor, valid: Tensor) -> list[Sequence]:
    """Each ends where the next begins, or at the last valid query of its row."""
    found: list[Sequence] = []
    for row, (row_begins, row_valid) in enumerate(zip(begins, valid, strict=True)):
        starts = row_begins.nonzero()[:, 0].tolist()
        ends = [*starts[1:], int(row_valid.nonzero()[-1, 0]) + 1] if starts else []
        found.extend(Sequence(row, start, stop) for start, stop in zip(starts, ends, strict=True))
    return found
