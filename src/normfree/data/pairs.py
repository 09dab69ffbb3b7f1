"""Pairs of a prompt and its completion, for supervised fine-tuning: only the completion is predicted."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from normfree.data.corpus_name import existing_file
from normfree.data.data_config import DataConfig
from normfree.data.documents import Admission, Split
from normfree.data.local import LocalCorpus
from normfree.data.packed_sequences import SplitStatistics, TokenizedDocument, pack
from normfree.data.records import RECORDS, Record, kind_of, read_records
from normfree.errors import InputError

FIELDS = ("prompt", "completion")


class Pair(NamedTuple):
    """What the model reads, and what it learns to write."""

    prompt: str
    completion: str


class PairCorpus(LocalCorpus):
    """Pairs in the order and the splits of a :class:`~normfree.data.local.LocalCorpus` of their texts."""

    def _text(self, content: bytes) -> bytes:
        return "".join(json.loads(content)).encode("utf-8", "surrogatepass")

    def _admitted_passages(self, large: list[Path | bytes], admission: Admission) -> list[Any]:
        return []  # a part of a pair is not a pair

    def pairs(self, split: Split) -> Iterator[Pair]:
        """The pairs of a split.

        Raises:
            InputError: there are none.
        """
        return (Pair(*json.loads(document)) for document in super().documents(split))

    def documents(self, split: Split) -> Iterator[str]:
        """The texts of the pairs, prompt and completion in one."""
        return ("".join(pair) for pair in self.pairs(split))


def prompt_completion_pairs(argument: str, config: DataConfig) -> PairCorpus:
    """``pairs:PATH``: records with the texts ``prompt`` and ``completion``; JSON lines if the name does not say."""
    path = existing_file(argument, config.corpus)
    if config.cut != "packed":
        raise InputError(f"corpus {config.corpus!r}: pairs are shorter than a sequence; set data.cut to packed")
    kind = kind_of(path)
    records = read_records(path, config.corpus, FIELDS, kind if kind in RECORDS else ".jsonl")
    return PairCorpus(_documents(records), config)


def write_pairs(
    path: Path, predicted_path: Path, pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> SplitStatistics:
    """Packs pairs, and which of their tokens are predicted (:func:`~normfree.data.packed_sequences.pack`).

    Pair follows pair (beginning, prompt, completion, end-of-text token), cut wherever a sequence is full. Every
    sequence begins with the beginning; the last remainder is dropped. Completions and their end-of-text tokens are
    predicted.

    Raises:
        InputError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token to end completions with; use another one")
    documents = (_tokenized(pair, tokenizer) for pair in pairs)
    return pack(path, documents, tokenizer, joined=True, predicted_path=predicted_path, **options)


def _tokenized(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> TokenizedDocument:
    prompt, completion = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for text in pair
    )
    tokens = np.asarray([*prompt, *completion, tokenizer.eos_token_id], np.int64)
    n_bytes = sum(len(text.encode("utf-8")) for text in pair)
    return TokenizedDocument(n_bytes, len(prompt) + len(completion), tokens, np.arange(len(tokens)) >= len(prompt))


def _documents(records: Iterator[tuple[str, Record]]) -> Iterator[bytes]:
    """Each pair as the JSON array of its two texts."""
    for where, row in records:
        if isinstance(row, bytes):
            raise InputError(f"{where}: not UTF-8; write the file in UTF-8")
        if not isinstance(row, dict) or any(not isinstance(row.get(name), str) for name in FIELDS):
            raise InputError(f"{where}: give an object with the texts {' and '.join(FIELDS)}")
        if not row["completion"]:
            raise InputError(f"{where}: the completion is empty; there is nothing to predict")
        yield json.dumps([row[name] for name in FIELDS]).encode("utf-8")
