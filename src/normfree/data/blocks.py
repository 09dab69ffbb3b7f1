"""Blocks of tokens on disk: how documents are cut into them, written, and read back memory-mapped."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from normfree.data.tokenizer import vocabulary_size

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
        Remainders shorter than a block. Whole blocks beyond the cap are not among them, nor, with
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


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """A memory-mapped ``.npy`` file of tokens, [n_blocks, T], uint16 or uint32, as a map-style data set.

    An item is ``{"input_ids": int64 [T], "labels": int64 [T]}``, both the same tokens: causal LMs shift the
    labels themselves. With ``predicted_path``, a file of bool [n_blocks, T], labels of the other tokens are -100.
    Workers get the paths, not the tokens.
    """

    def __init__(self, path: Path, predicted_path: Path | None = None) -> None:
        self.path = path
        self.predicted_path = predicted_path
        self.tokens: NDArray[np.unsignedinteger] = np.load(path, mmap_mode="r")
        self.predicted: NDArray[np.bool_] | None = None if predicted_path is None else np.load(predicted_path)

    @property
    def sequence_length(self) -> int:
        """T, tokens in a block."""
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
        """Tokens of each block that a causal LM has to predict: all but the first, or those that are marked."""
        if self.predicted is None:
            return np.full(len(self), self.sequence_length - 1)
        return self.predicted[:, 1:].sum(axis=1, dtype=np.int64)

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Path | None]]:
        return type(self), (self.path, self.predicted_path)


class _BlockWriter:
    """Writes a .npy file [n_blocks, T] whose length is known only at the end."""

    def __init__(self, path: Path, sequence_length: int, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._file = path.open("wb")
        self._sequence_length = sequence_length
        self._dtype = dtype
        self._n_blocks = 0

    def __enter__(self) -> Self:
        self._write_header()
        return self

    def __exit__(self, *_: object) -> None:
        # numpy pads the header so that its first dimension can grow in place.
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, tokens: NDArray[np.unsignedinteger]) -> None:
        """Append tokens, a whole number of blocks."""
        self._file.write(tokens.tobytes())
        self._n_blocks += len(tokens) // self._sequence_length

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._n_blocks, self._sequence_length),
            },
        )


def write_blocks(
    path: Path,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    separator: int | None = None,
    max_tokens: int | None = None,
    report: Callable[[int], object] = lambda _: None,
) -> SplitStatistics:
    """Tokenize documents, cut them into blocks and write these to ``path``.

    Args:
        path: The .npy file to write, uint16 if every token id fits, else uint32.
        documents: Read only as far as ``max_tokens`` needs.
        tokenizer: Adds no special tokens of its own, and takes text that looks like a special token as text.
        sequence_length: T.
        separator: None cuts each document apart and drops its remainder (``chunks``). A token id joins the
            documents with that token between them first and drops only the last remainder (``packed``).
        max_tokens: Upper bound on the tokens written.
        report: Called with the number of tokens written so far.
    """
    T = sequence_length
    dtype = token_dtype(tokenizer)
    most = None if max_tokens is None else max_tokens // T * T
    statistics = SplitStatistics()
    remainder = np.empty(0, dtype)
    with _BlockWriter(path, T, dtype) as writer:
        for n_bytes, ids in _tokenize(documents, tokenizer):
            statistics.documents += 1
            statistics.bytes += n_bytes
            statistics.document_tokens += len(ids)
            tokens = np.asarray(ids, dtype)
            if separator is not None and statistics.documents > 1:
                tokens = np.concatenate([remainder, np.asarray([separator], dtype), tokens])
            whole = len(tokens) // T * T
            taken = whole if most is None else min(whole, most - statistics.tokens)
            writer.append(tokens[:taken])
            statistics.tokens += taken
            remainder = tokens[whole:]
            if separator is None:
                statistics.dropped_tokens += len(remainder)
            report(statistics.tokens)
            if statistics.tokens == most:
                break
        else:
            if separator is not None:
                statistics.dropped_tokens = len(remainder)
    statistics.blocks = statistics.tokens // T
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
