"""From an attention that was computed to its sequences, and to the entropy of their queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.compiled import WIDENED
from normfree.entropy.compiled_attention import Attended
from normfree.entropy.fused import attention_entropy_and_sink
from normfree.entropy.nonfinite_scores import NonFiniteCount, count_nonfinite
from normfree.entropy.reference import read_weights
from normfree.entropy.visibility import Visibility, visibility_of
from normfree.probes.interception import InterfaceCall, SoftmaxCall
from normfree.probes.layer_statistics import Queries
from normfree.probes.padding import UnclearPaddingError, first_own_key, valid_queries
from normfree.probes.reading import Attention, UnreadableCallError, read_call
from normfree.probes.sequences import EntangledSequencesError, Sequence, packed_sequences
from normfree.probes.softmax import count_nonfinite_scores, read_scores, visibility_of_scores
from normfree.probes.watching import Attending


class Measured(NamedTuple):
    """Queries with their entropies in nats and their attention to the first key, [batch, n_head, n_query] each.

    ``sink_share`` is None for queries that continue a sequence, ``nonfinite`` if not asked for or known to be 0.
    """

    queries: Queries
    entropy: Tensor
    sink_share: Tensor | None
    nonfinite: NonFiniteCount | None


class Part(NamedTuple):
    """The queries of one sequence of a packed row, or of all rows, and what their softmax is computed from.

    attention: their queries and keys, with the bias in ``visibility``; None where the module made its own scores.
    scores: these, [batch, n_head, n_query, n_key], which entered its softmax.
    """

    queries: Queries
    visibility: Visibility
    attention: Attention | None
    scores: Tensor | None


class _Masked(NamedTuple):
    """What a mask says of one sequence of a packed row, or of all rows."""

    sequence: Sequence | None
    visibility: Visibility
    queries: Queries


@dataclass(frozen=True)
class _KnownMask:
    """What a mask, or none, says of calls of one kind. Holding the mask keeps its memory from being reused."""

    mask: Tensor | None
    version: int
    kind: tuple[Any, ...]
    masked: tuple[_Masked, ...]

    def is_same(self, mask: Tensor | None, kind: tuple[Any, ...]) -> bool:
        if self.kind != kind:
            return False
        if self.mask is None or mask is None:
            return self.mask is mask
        return self.mask.is_set_to(mask) and self.version == mask._version


class Parts:
    """Splits attentions into sequences. The mask that a model's layers share is read once."""

    def __init__(self) -> None:
        self._mask: _KnownMask | None = None
        self._causal: Queries | None = None

    def forget_mask(self) -> None:
        self._mask = None

    def causal(self, n_row: int, n_query: int) -> Queries:
        """The queries of sequences from their first token on, of which each sees the keys up to its own."""
        if self._causal is None or self._causal.valid.shape != (n_row, n_query):
            counts = torch.arange(1, n_query + 1)[None, None]
            self._causal = Queries(0, torch.ones(n_row, n_query, dtype=torch.bool), counts)
        return self._causal

    def of(self, attending: Attending) -> Iterator[Part]:
        """One item for each sequence of a packed row, or one for all rows.

        Raises:
            UnreadableCallError, InputError: with the reason.
        """
        if isinstance(attending.call, SoftmaxCall):
            yield from _scored_parts(attending.call.scores, attending)
            return
        attention = read_call(attending.call)
        start = _start(attending, attention.q.shape[2], attention.k.shape[2])
        for sequence, visibility, queries in self._masked(attention, attending.module, start):
            of_sequence = part_of(attention, sequence)
            if of_sequence.bias is not None:
                allowed = visibility.allowed
                visibility = visibility.with_bias(of_sequence.bias)
                if visibility.allowed is not allowed:
                    queries = replace(queries, counts=visibility.counts + (attention.sinks is not None))
            yield Part(queries, visibility, of_sequence, None)

    def _masked(self, attention: Attention, module: nn.Module, start: int) -> tuple[_Masked, ...]:
        mask, q, k = attention.attention_mask, attention.q, attention.k
        kind = (
            *(q.shape, k.shape, q.device, attention.is_causal, attention.sliding_window, start, _is_causal(module)),
            *(_chunk(module), attention.sinks is not None, attention.sequences),
        )
        if self._mask is not None and self._mask.is_same(mask, kind):
            return self._mask.masked
        masked = tuple(_split(attention, module, start))
        # tensors of inference mode do not say whether they have been written to
        if mask is None or not mask.is_inference():
            version = 0 if mask is None else mask._version
            self._mask = _KnownMask(mask, version, kind, masked)
        return masked


def measure_call(parts: Parts, attending: Attending, backend: str, counts_nonfinite: bool) -> Iterator[Measured]:
    """The entropies of one call: those that came with its output, or else of each of its parts.

    Raises:
        UnreadableCallError, InputError: with the reason.
    """
    call = attending.call
    attended = call.weights if isinstance(call, InterfaceCall) and isinstance(call.weights, Attended) else None
    if (
        attended is None
        or backend != "auto"
        or attending.start
        # scores that overflow in the dtype of the queries are finite in the kernel's float32
        or (counts_nonfinite and attended.output.dtype in WIDENED)
        or bool(attended.entropy.isnan().any())
    ):
        yield from measure(parts.of(attending), backend, counts_nonfinite)
    else:  # every score is finite
        n_row, _, n_query = attended.entropy.shape
        yield Measured(parts.causal(n_row, n_query), attended.entropy, attended.first, None)


def measure(parts: Iterable[Part], backend: str, counts_nonfinite: bool) -> Iterator[Measured]:
    """The entropies of each part.

    Raises:
        UnreadableCallError, InputError: with the reason.
    """
    for part in parts:
        if part.scores is not None:
            yield _measure_scores(part.scores, part, counts_nonfinite)
        else:
            assert part.attention is not None
            yield _measure_attention(part.attention, part, backend, counts_nonfinite)


def _measure_scores(scores: Tensor, part: Part, counts_nonfinite: bool) -> Measured:
    queries, visibility = part.queries, part.visibility
    read = read_scores(scores, visibility)
    nonfinite = NonFiniteCount(*count_nonfinite_scores(scores, visibility)) if counts_nonfinite else None
    return Measured(queries, read.entropy, read.sink_share if queries.start == 0 else None, nonfinite)


def _measure_attention(attention: Attention, part: Part, backend: str, counts_nonfinite: bool) -> Measured:
    queries, visibility = part.queries, part.visibility
    read = None
    if attention.weights is not None and backend == "auto":
        read = read_weights(attention.weights, visibility)
    if attention.selects and read is None:
        raise UnreadableCallError("it attends to selected keys, and handed back no float32 distribution over them")
    q, k, scale = attention.q, attention.k, attention.scale
    if read is not None:
        entropy, share = read.entropy, read.sink_share
    else:
        entropy, share = attention_entropy_and_sink(
            q, k, scale, visibility, backend, softcap=attention.softcap, sinks=attention.sinks
        )
    # a soft-cap makes finite scores of infinite ones
    known_finite = read is not None and read.all_scores_finite and attention.softcap is None
    counted = counts_nonfinite and not known_finite
    nonfinite = count_nonfinite(q, k, scale, visibility) if counted else None
    return Measured(queries, entropy, share if queries.start == 0 else None, nonfinite)


def _scored_parts(scores: Tensor, attending: Attending) -> Iterator[Part]:
    start = _start(attending, *scores.shape[2:])
    visibility = visibility_of_scores(scores)
    valid = _valid(visibility, start, attending.module)
    assert visibility.allowed is not None
    # no padding is the first key of its row
    visibility = replace(visibility, allowed=visibility.allowed & valid[:, None, :, None])
    sequences = _sequences(visibility, valid, attending.module, start)
    if not sequences:
        yield Part(Queries(start, valid, visibility.counts), visibility, None, scores)
    for row, first, stop in sequences:
        part = scores[row : row + 1, :, first:stop, first:stop]
        visibility = visibility_of_scores(part)
        yield Part(Queries(0, valid[row : row + 1, first:stop], visibility.counts), visibility, None, part)


def _split(attention: Attention, module: nn.Module, start: int) -> Iterator[_Masked]:
    sequences = attention.sequences
    if not sequences:
        whole = _masked(attention, None, start, module)
        sequences = _sequences(whole.visibility, whole.queries.valid, module, start)
        if not sequences:
            yield whole
            return
    for sequence in sequences:
        yield _masked(part_of(attention, sequence), sequence, 0, module)


def _masked(attention: Attention, sequence: Sequence | None, start: int, module: nn.Module) -> _Masked:
    visibility = visibility_of(
        attention.q,
        attention.k,
        is_causal=attention.is_causal,
        attention_mask=attention.attention_mask,
        sliding_window=attention.sliding_window,
    )
    valid = _valid(visibility, start, module)
    return _Masked(sequence, visibility, Queries(start, valid, visibility.counts + (attention.sinks is not None)))


def _sequences(visibility: Visibility, valid: Tensor, module: nn.Module, start: int) -> tuple[Sequence, ...]:
    if not _is_causal(module) and visibility.n_query != visibility.n_key:
        return ()  # cross-attention
    try:
        return packed_sequences(visibility, valid, first_own_key(visibility, start), _chunk(module))
    except EntangledSequencesError:
        raise UnreadableCallError(
            "its mask lets sequences begin inside a row that are not apart from the others, so the positions of its "
            "queries are not known"
        ) from None


def _valid(visibility: Visibility, start: int, module: nn.Module) -> Tensor:
    try:
        return valid_queries(visibility, start, is_causal=_is_causal(module))
    except UnclearPaddingError:
        raise UnreadableCallError(
            "its mask chooses keys, and hides the own keys of some queries, which cannot be told from padding"
        ) from None


def part_of(attention: Attention, sequence: Sequence | None) -> Attention:
    """The attention within one sequence of a packed row; with None, all of it."""
    if sequence is None:
        return attention
    row, start, stop = sequence
    inside = slice(start, stop)

    def cut(tensor: Tensor | None, *dims: int) -> Tensor | None:
        """The sequence's part: of dim 0 its row, of the other dims its positions; a size of 1 stands for all."""
        if tensor is None:
            return None
        tensor = tensor if tensor.shape[0] == 1 else tensor[row : row + 1]
        for dim in dims:
            tensor = tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, start, stop - start)
        return tensor

    mask, sinks = attention.attention_mask, attention.sinks
    return replace(
        attention,
        q=attention.q[row : row + 1, :, inside],
        k=attention.k[row : row + 1, :, inside],
        attention_mask=cut(mask, 1) if mask is not None and mask.dim() == 2 else cut(mask, 2, 3),
        weights=cut(attention.weights, 2, 3),
        bias=cut(attention.bias, 2, 3),
        sinks=cut(sinks, 2) if sinks is not None and sinks.dim() == 3 else sinks,
        sequences=(),
    )


def _start(attending: Attending, n_query: int, n_key: int) -> int:
    """The position of the first query, counted from the first key of the row."""
    if attending.start is not None:
        return attending.start
    if n_query != n_key and not _is_causal(attending.module):
        return 0  # cross-attention
    # without a transformers cache in sight the queries are the last positions of the keys'
    return max(0, n_key - n_query)


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True))


def _chunk(module: nn.Module) -> int | None:
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    return chunk if isinstance(chunk, int) and chunk > 0 else None
