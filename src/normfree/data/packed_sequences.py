"""Sequences of tokens on disk: how documents are cut into them, written, and read back memory-mapped."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from normfree.data.tokenizer import vocabulary_size
from normfree.errors import InputError

NOT_PREDICTED = -100
"""The label of a token that is not predicted, for transformers as for torch."""
BATCH_BYTES = 2**20
"""Documents are tokenized together up to this size: enough for every core, little wasted at a cap."""


@dataclass
class SplitStatistics:
    """What a split was made of.

    documents, bytes, document_tokens:
        Documents tokenized, their UTF-8 bytes, and their tokens before cutting. A document in which
        the cap was reached counts whole.
    blocks, tokens:
        What was written; with ``cut="packed"`` this includes the end-of-text tokens between documents.
    dropped_tokens:
        Remainders shorter than a sequence. Whole sequences beyond the cap are not among them, nor, with
        ``cut="packed"``, anything beyond it.
    """

    documents: int = 0
    bytes: int = 0
    document_tokens: int = 0
    blocks: int = 0
    tokens: int = 0
    dropped_tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes in a token, on average: bits per byte = nats per token / ln 2 / this."""
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
        input_ids = torch.from_numpy(np.asarray(self.tokens[indices], np.int64))
        all_labels = input_ids.clone()
        if self.predicted is not None:
            all_labels[torch.from_numpy(~self.predicted[indices])] = NOT_PREDICTED
        return [{"input_ids": ids, "labels": labels} for ids, labels in zip(input_ids, all_labels, strict=True)]

    def n_predicted(self) -> NDArray[np.int64]:
        """Tokens of each sequence that a causal LM has to predict: all but the first, or those that are marked."""
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
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._n_sequences, self._sequence_length),
            },
        )


class Sequences(NamedTuple):
    """Whole sequences, and which of them are predicted, [n, T] each."""

    tokens: NDArray[np.int64]
    predicted: NDArray[np.bool_]

    @classmethod
    def empty(cls, sequence_length: int) -> Self:
        """No sequence of ``sequence_length`` tokens."""
        return cls(np.empty((0, sequence_length), np.int64), np.empty((0, sequence_length), np.bool_))


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
        self._beginning = np.asarray(beginning, np.int64)
        self._left = np.empty(0, np.int64)
        self._left_predicted = np.empty(0, np.bool_)

    @property
    def n_left(self) -> int:
        """Tokens that no sequence holds yet, a beginning in front of them not counted."""
        return max(0, len(self._left) - len(self._beginning))

    def cut(self, tokens: NDArray[np.int64], predicted: NDArray[np.bool_], separator: int | None = None) -> Sequences:
        """The sequences that a document completes; ``separator`` goes before it, at the end of the previous one."""
        T, n = self._T, len(self._beginning)
        before = np.asarray([] if separator is None or (n and not len(self._left)) else [separator], np.int64)
        start = len(self._left) + len(before)
        unpredicted = np.zeros(n, np.bool_)
        stream = np.concatenate([self._left, before, self._beginning, tokens])
        mask = np.concatenate([self._left_predicted, np.ones(len(before), np.bool_), unpredicted, predicted])
        if len(stream) < T:
            self._keep(stream, mask)
            return Sequences.empty(T)
        # A beginning that the first sequence cuts through is repeated whole in the second.
        again = T if start + n <= T else start + n
        rest, rest_mask = stream[again:], mask[again:]
        n_more = len(rest) // (T - n)
        more, more_mask = rest[: n_more * (T - n)].reshape(-1, T - n), rest_mask[: n_more * (T - n)].reshape(-1, T - n)
        sequences = np.concatenate([stream[None, :T], self._with_beginning(more)])
        masks = np.concatenate([mask[None, :T], np.hstack([np.tile(unpredicted, (n_more, 1)), more_mask])])
        left = rest[n_more * (T - n) :]
        if len(left):
            self._keep(np.concatenate([self._beginning, left]), np.concatenate([unpredicted, rest_mask[-len(left) :]]))
        else:
            self._keep(left, rest_mask[:0])
        return Sequences(sequences, masks)

    def drop(self) -> int:
        """Drops what is left; the number of tokens, a beginning in front of them not counted."""
        n_dropped = self.n_left
        self._keep(self._left[:0], self._left_predicted[:0])
        return n_dropped

    def _with_beginning(self, bodies: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.hstack([np.tile(self._beginning, (len(bodies), 1)), bodies])

    def _keep(self, tokens: NDArray[np.int64], predicted: NDArray[np.bool_]) -> None:
        self._left, self._left_predicted = tokens, predicted


def write_sequences(
    path: Path,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    beginning: tuple[int, ...] = (),
    predicted_path: Path | None = None,
    separator: int | None = None,
    max_tokens: int | None = None,
    report: Callable[[int], object] = lambda _: None,
) -> SplitStatistics:
    """Tokenize documents, cut them into sequences and write these to ``path``.

    Args:
        path: The .npy file to write, uint16 if every token id fits, else uint32.
        documents: Read only as far as ``max_tokens`` needs.
        tokenizer: Adds no special tokens of its own, and takes text that looks like a special token as text.
        sequence_length: T.
        beginning: The first tokens of each sequence, and of each document: a sequence has T - len(beginning) others.
        predicted_path: The .npy file to write which tokens are predicted to, bool: those of no beginning.
        separator: None cuts each document apart and drops its remainder (``chunks``). A token id joins the
            documents with that token between them and drops only the last remainder (``packed``).
        max_tokens: Upper bound on the tokens written.
        report: Called with the number of tokens written so far.

    Raises:
        InputError: the beginning leaves no room in a sequence.
    """
    T = sequence_length
    most = None if max_tokens is None else max_tokens // T
    statistics = SplitStatistics()
    cutter = Cutter(T, beginning)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_SequenceWriter(path, T, token_dtype(tokenizer)))
        masks = None
        if predicted_path is not None:
            masks = stack.enter_context(_SequenceWriter(predicted_path, T, np.dtype(np.bool_)))
        for n_bytes, ids in _tokenize(documents, tokenizer):
            tokens = np.asarray(ids, np.int64)
            between = separator if statistics.documents else None
            statistics.documents += 1
            statistics.bytes += n_bytes
            statistics.document_tokens += len(ids)
            sequences = cutter.cut(tokens, np.ones(len(tokens), np.bool_), between)
            taken = slice(None if most is None else most - statistics.blocks)
            writer.append(sequences.tokens[taken])
            if masks is not None:
                masks.append(sequences.predicted[taken])
            statistics.blocks += len(sequences.tokens[taken])
            if separator is None:
                statistics.dropped_tokens += cutter.drop()
            report(statistics.blocks * T)
            if statistics.blocks == most:
                break
        else:
            statistics.dropped_tokens += cutter.drop()
    statistics.tokens = statistics.blocks * T
    return statistics


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[np.unsignedinteger]:
    """uint16 if every token id fits, else uint32."""
    return np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)


def _tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, list[int]]]:
    """The UTF-8 size and the tokens of each document."""
    for batch in _batches(documents):
        encoding = tokenizer(
            [text for _, text in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents longer than the model's context are expected here
        )
        yield from zip((n_bytes for n_bytes, _ in batch), encoding["input_ids"], strict=True)


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
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
