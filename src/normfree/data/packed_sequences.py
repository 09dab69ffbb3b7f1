"""Sequences of tokens on disk: documents are cut into them, written, and read back memory-mapped."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from normfree.data.tokenizer import vocabulary_size
from normfree.errors import InputError
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED

BATCH_BYTES = 2**20
"""Documents are tokenized together up to this size: enough for every core, little wasted at a cap."""


@dataclass
class SplitStatistics:
    """What a split was made of.

    documents, bytes, document_tokens: documents tokenized, their UTF-8 bytes, and their tokens before cutting. A
        document in which the cap was reached counts whole.
    blocks, tokens: sequences and tokens written; with ``cut="packed"`` including end-of-text tokens.
    dropped_tokens: remainders shorter than a sequence; not what lies beyond the cap.
    """

    documents: int = 0
    bytes: int = 0
    document_tokens: int = 0
    blocks: int = 0
    tokens: int = 0
    dropped_tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of a token: bits per byte = nats per token / ln 2 / this."""
        return self.bytes / self.document_tokens if self.document_tokens else float("nan")


class PackedSequences(Dataset[dict[str, torch.Tensor]]):
    """A memory-mapped ``.npy`` file of tokens, [n_sequences, T], uint16 or uint32, as a map-style data set.

    An item is ``{"input_ids": int64 [T], "labels": int64 [T]}``, both the same tokens: causal LMs shift the
    labels themselves. With ``predicted_path``, a file of bool [n_sequences, T], labels of the other tokens are -100.
    Workers get the paths, not the tokens.
    """

    def __init__(self, path: Path, predicted_path: Path | None = None) -> None:
        self.path = path
        self.predicted_path = predicted_path
        self.tokens: NDArray[np.unsignedinteger] = np.load(path, mmap_mode="r")
        self.predicted: NDArray[np.bool_] | None = None if predicted_path is None else np.load(predicted_path)

    @property
    def sequence_length(self) -> int:
        """T, tokens in a sequence."""
        return int(self.tokens.shape[1])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*self._read(indices), strict=True)]

    def whole(self, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels of all, or of the first ``n``, sequences: int64 [n, T] each."""
        return self._read(slice(n))

    def _read(self, indices: list[int] | slice) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = torch.from_numpy(np.asarray(self.tokens[indices], np.int64))
        labels = input_ids.clone()
        if self.predicted is not None:
            labels[torch.from_numpy(~self.predicted[indices])] = NOT_PREDICTED
        return input_ids, labels

    def n_predicted(self) -> NDArray[np.int64]:
        """Predicted tokens of each sequence, [n_sequences]: all but the first, or those that are marked."""
        if self.predicted is None:
            return np.full(len(self), self.sequence_length - 1)
        return self.predicted[:, 1:].sum(axis=1, dtype=np.int64)

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Path | None]]:
        return type(self), (self.path, self.predicted_path)


class _SequenceWriter:
    """Writes a .npy file [n_sequences, T] whose length is known only at the end."""

    def __init__(self, path: Path, sequence_length: int, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._sequence_length = sequence_length
        self._dtype = dtype
        self._n_sequences = 0

    def __enter__(self) -> Self:
        self._write_header()
        return self

    def __exit__(self, *_: object) -> None:
        # numpy pads the header so that its first dimension can grow in place.
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, sequences: NDArray[Any]) -> None:
        """Append sequences, [n, T]."""
        self._file.write(sequences.astype(self._dtype, copy=False).tobytes())
        self._n_sequences += len(sequences)

    def _write_header(self) -> None:
        shape = (self._n_sequences, self._sequence_length)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class Sequences(NamedTuple):
    """Whole sequences, and which of their tokens are predicted, [n, T] each."""

    tokens: NDArray[np.int64]
    predicted: NDArray[np.bool_]


class Cutter:
    """Cuts documents into sequences of T tokens that all begin with ``beginning``, whose tokens are not predicted.

    Document follows document, each with its own beginning, until :meth:`drop` separates them.
    """

    def __init__(self, sequence_length: int, beginning: tuple[int, ...]) -> None:
        if sequence_length <= len(beginning) + 1:
            raise InputError(
                f"sequences of {sequence_length} tokens have no room behind the {len(beginning)} that the tokenizer "
                "puts first; give longer ones"
            )
        self._T = sequence_length
        # Tokens in the first row, 1 for predicted ones in the second; so everywhere below.
        self._beginning = np.array([beginning, [0] * len(beginning)], np.int64)
        self._left = np.empty((2, 0), np.int64)

    @property
    def n_left(self) -> int:
        """Tokens not yet in a sequence, a beginning before them not counted."""
        return max(0, self._left.shape[1] - self._beginning.shape[1])

    def cut(self, tokens: NDArray[np.int64], predicted: NDArray[np.bool_], separator: int | None = None) -> Sequences:
        """The sequences that a document completes; ``separator`` goes before it, at the end of the previous one."""
        T, n = self._T, self._beginning.shape[1]
        is_separated = separator is not None and (n == 0 or self._left.shape[1] > 0)
        before = np.array([[separator], [1]] if is_separated else [[], []], np.int64)
        start = self._left.shape[1] + before.shape[1]
        stream = np.hstack([self._left, before, self._beginning, np.stack([tokens, predicted])])
        if stream.shape[1] < T:
            self._left = stream
            whole = np.empty((2, 0, T), np.int64)
        else:
            # A beginning that the first sequence cuts through is repeated whole in the second.
            rest = stream[:, max(T, start + n) :]
            n_more = rest.shape[1] // (T - n)
            bodies = rest[:, : n_more * (T - n)].reshape(2, n_more, T - n)
            more = np.concatenate([np.repeat(self._beginning[:, None], n_more, axis=1), bodies], axis=2)
            whole = np.concatenate([stream[:, None, :T], more], axis=1)
            left = rest[:, n_more * (T - n) :]
            self._left = np.hstack([self._beginning, left]) if left.shape[1] else left
        return Sequences(whole[0], whole[1].astype(np.bool_))

    def drop(self) -> int:
        """Drops the remainder; returns its number of tokens, a beginning before them not counted."""
        n_dropped = self.n_left
        self._left = self._left[:, :0]
        return n_dropped


class TokenizedDocument(NamedTuple):
    """A document as it is cut: its UTF-8 bytes, the tokens of its text, all its tokens, and which are predicted."""

    n_bytes: int
    n_text_tokens: int
    tokens: NDArray[np.int64]
    predicted: NDArray[np.bool_]


def pack(
    path: Path,
    documents: Iterable[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    joined: bool,
    beginning: tuple[int, ...] = (),
    predicted_path: Path | None = None,
    separator: int | None = None,
    max_tokens: int | None = None,
    report: Callable[[int], object] = lambda _: None,
) -> SplitStatistics:
    """Cuts documents into sequences and writes these to ``path``.

    Args:
        path: the .npy file to write, uint16 if every token id of ``tokenizer`` fits, else uint32.
        documents: read only as far as ``max_tokens`` needs.
        sequence_length: T.
        joined: False cuts each document apart and drops its remainder; True drops only the last one.
        beginning: the first tokens of each sequence, and of each document.
        predicted_path: the .npy file, bool, of which tokens are predicted; those of a beginning never are.
        separator: token id between joined documents; None puts nothing between them.
        max_tokens: upper bound on the tokens written.
        report: receives the number of tokens written so far.

    Raises:
        InputError: the beginning leaves no room in a sequence.
    """
    T = sequence_length
    most = None if max_tokens is None else max_tokens // T
    statistics = SplitStatistics()
    cutter = Cutter(T, beginning)
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_SequenceWriter(path, T, dtype))
        masks = None
        if predicted_path is not None:
            masks = stack.enter_context(_SequenceWriter(predicted_path, T, np.dtype(np.bool_)))
        for document in documents:
            between = separator if statistics.documents else None
            statistics.documents += 1
            statistics.bytes += document.n_bytes
            statistics.document_tokens += document.n_text_tokens
            sequences = cutter.cut(document.tokens, document.predicted, between)
            taken = slice(None if most is None else most - statistics.blocks)
            writer.append(sequences.tokens[taken])
            if masks is not None:
                masks.append(sequences.predicted[taken])
            statistics.blocks += len(sequences.tokens[taken])
            if not joined:
                statistics.dropped_tokens += cutter.drop()
            report(statistics.blocks * T)
            if statistics.blocks == most:
                break
        else:
            statistics.dropped_tokens += cutter.drop()
    statistics.tokens = statistics.blocks * T
    return statistics


def write_sequences(
    path: Path,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    separator: int | None = None,
    **options: Any,
) -> SplitStatistics:
    """Tokenizes documents and packs them (:func:`pack`); all tokens but those of a beginning are predicted.

    Args:
        tokenizer: adds no special tokens of its own, and takes text that looks like a special token as text.
        separator: None cuts each document apart (``chunks``). A token id joins the documents with that token between
            them (``packed``).
        options: of :func:`pack`.
    """
    joined = separator is not None
    return pack(path, _tokenize(documents, tokenizer), tokenizer, joined=joined, separator=separator, **options)


def _tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenizedDocument]:
    for batch in _batches(documents):
        for (n_bytes, _), ids in zip(batch, _token_ids([text for _, text in batch], tokenizer), strict=True):
            yield TokenizedDocument(n_bytes, len(ids), np.asarray(ids, np.int64), np.ones(len(ids), np.bool_))


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """Of each text, without special tokens."""
    if isinstance(tokenizer, PreTrainedTokenizerFast) and _encodes_plainly(type(tokenizer)):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        # The offsets that transformers asks for take two fifths of the time.
        return (each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False))
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model's context are expected here
    )
    found: list[list[int]] = encoding["input_ids"]
    return found


def _encodes_plainly(kind: type[PreTrainedTokenizerFast]) -> bool:
    """True if tokenizers of that class do not change what their backend does."""
    own: Any = kind
    plain: Any = PreTrainedTokenizerFast
    return own.__call__ is plain.__call__ and own._encode_plus is plain._encode_plus


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    """UTF-8 size and text of documents, together up to ``BATCH_BYTES``."""
    batch: list[tuple[int, str]] = []
    batch_bytes = 0
    for text in documents:
        n_bytes = len(text.encode("utf-8"))
        batch.append((n_bytes, text))
        batch_bytes += n_bytes
        if batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch
