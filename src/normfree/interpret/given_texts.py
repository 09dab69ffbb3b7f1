"""A caller's texts as token sequences: strings, columns of a data set, or token ids."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from normfree.data import Beginning
from normfree.errors import InputError
from normfree.interpret.sequences import (
    beginning_rule,
    check_vocabulary,
    default_sequence_length,
    named_tokenizer,
    tokenizer_of,
)
from normfree.training import LoadedModel

ALLOWED = "give a string, a list of strings, a datasets column, or token ids (int64 [n, T] or a list of lists)"


def given_sequences(
    measured: LoadedModel,
    texts: Any,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    *,
    bos: bool | None,
    sequence_length: int | None,
) -> tuple[list[torch.Tensor], Beginning]:
    """``texts`` as sequences of token ids, int64 [T_i], and the tokens that each begins with.

    Args:
        measured: the model that will read them.
        texts: a string, an iterable of strings, a ``datasets.Dataset`` with a text or an ``input_ids`` column, or token
            ids: a tensor or array [n, T] or [T], lists, or a tokenizer's output, whose attention mask removes padding.
        tokenizer: for strings; default: the one saved with the model.
        bos: as in :func:`normfree.interpret.token_sequences`; for strings only.
        sequence_length: the longest sequence in tokens, beginning included; longer texts are cut. Default: a run's own
            T; for other models 512, or their positions if fewer. For strings only.

    Raises:
        InputError: texts of another kind or without a token, tokens or lengths that the model does not take, or no
            tokenizer.
    """
    strings, rows = _read(texts)
    if strings is not None:
        sequences, beginning = _tokenized(measured, strings, tokenizer, bos, sequence_length)
    else:
        named = {"bos": bos, "sequence_length": sequence_length, "tokenizer": tokenizer}
        useless = [name for name, value in named.items() if value is not None]
        if useless:
            raise InputError(f"token ids are measured as they are; leave out {', '.join(useless)}, or give strings")
        sequences, beginning = [row for row in rows if len(row)], Beginning()
    if not sequences:
        raise InputError(f"the texts hold no token; {ALLOWED}")
    check_vocabulary(measured, sequences)
    for i, row in enumerate(sequences):
        if measured.n_positions is not None and len(row) > measured.n_positions:
            raise InputError(
                f"sequence {i} has {len(row)} tokens, more than the {measured.n_positions} positions of "
                f"{measured.source}; give shorter ones"
            )
    return sequences, beginning


def _read(texts: Any) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Either strings, or None and token ids."""
    if isinstance(texts, str):
        return [texts], []
    texts = _column(texts)
    if isinstance(texts, Mapping):
        return None, _unpadded(texts)
    if isinstance(texts, (torch.Tensor, np.ndarray)) and texts.ndim > 0 and not _holds_objects(texts):
        return None, _rows(texts)
    if isinstance(texts, (bytes, torch.Tensor)) or not isinstance(texts, Iterable):
        raise InputError(f"cannot measure on a {type(texts).__name__}; {ALLOWED}")
    items = list(texts)
    if items and isinstance(items[0], str):
        for i, item in enumerate(items):
            if not isinstance(item, str):
                raise InputError(f"text {i} is a {type(item).__name__}, not a string; leave it out, or replace it")
        return items, []
    if items and all(_is_integer(item) for item in items):
        return None, [torch.tensor([int(item) for item in items])]
    return None, [_row(i, item) for i, item in enumerate(items)]


def _holds_objects(texts: torch.Tensor | np.ndarray) -> bool:
    return isinstance(texts, np.ndarray) and texts.dtype.kind in "OUST"


def _column(texts: Any) -> Any:
    """The column of a data set that holds texts or token ids; anything else unchanged."""
    columns = getattr(texts, "column_names", None) if "datasets" in sys.modules else None
    kind = type(texts).__name__
    if kind in ("DatasetDict", "IterableDatasetDict"):
        raise InputError(f"a {kind} holds several splits; give one of them: {', '.join(texts)}")
    if kind == "IterableDataset":
        raise InputError("an IterableDataset has no known end; give a list of what to measure on")
    if kind == "DataFrame":
        raise InputError("a DataFrame is no text; give one of its columns")
    if not isinstance(columns, list):
        return texts
    if "input_ids" in columns:
        return {name: list(texts[name]) for name in ("input_ids", "attention_mask") if name in columns}
    of_text = [name for name in columns if getattr(texts.features[name], "dtype", None) in ("string", "large_string")]
    if "text" in of_text or len(of_text) == 1:
        return list(texts["text" if "text" in of_text else of_text[0]])
    raise InputError(f"the data set has no column 'text' among {', '.join(columns)}; give one column of it")


def _unpadded(encoded: Mapping[str, Any]) -> list[torch.Tensor]:
    """The token ids of a tokenizer's output without padding, by its attention mask."""
    if "input_ids" not in encoded:
        raise InputError(f"cannot measure on a mapping with {', '.join(map(str, encoded))}; it needs input_ids")
    _, rows = _read(encoded["input_ids"])
    mask = encoded.get("attention_mask")
    if mask is None:
        return rows
    masks = _read(mask)[1]
    if [len(each) for each in masks] != [len(row) for row in rows]:
        raise InputError("input_ids and attention_mask differ in shape; give those of one call of the tokenizer")
    return [row[each.bool()] for row, each in zip(rows, masks, strict=True)]


def _rows(tokens: torch.Tensor | np.ndarray) -> list[torch.Tensor]:
    ids = torch.as_tensor(tokens)
    if ids.dim() > 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids have to be whole numbers [n, T], got {ids.dtype} {list(ids.shape)}")
    return list(ids.reshape(-1, ids.shape[-1]).long().cpu())


def _row(i: int, item: Any) -> torch.Tensor:
    if isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim == 1 and not _holds_objects(item):
        return _rows(item)[0]
    if isinstance(item, Sequence) and not isinstance(item, (str, bytes)) and all(map(_is_integer, item)):
        return torch.tensor([int(each) for each in item], dtype=torch.int64)
    raise InputError(f"item {i} of the texts is a {type(item).__name__}, no string and no token ids; {ALLOWED}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _tokenized(
    measured: LoadedModel,
    strings: list[str],
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    bos: bool | None,
    sequence_length: int | None,
) -> tuple[list[torch.Tensor], Beginning]:
    reader = _tokenizer(measured, tokenizer)
    beginning = Beginning.of(reader, beginning_rule(measured, bos))
    T = default_sequence_length(measured) if sequence_length is None else sequence_length
    if len(beginning) + 1 > T:
        raise InputError(f"sequence_length {T} leaves no room for text; give at least {max(2, len(beginning) + 1)}")
    if measured.n_positions is not None and measured.n_positions < T:
        raise InputError(f"sequence_length {T} is more than the {measured.n_positions} positions of {measured.source}")
    # An empty text has no token of its own, and its beginning alone is not measured.
    encoded = reader([each for each in strings if each] or [""], add_special_tokens=False, verbose=False)["input_ids"]
    n_text = T - len(beginning)
    return [
        torch.tensor([*beginning.token_ids, *ids[start : start + n_text]])
        for ids in encoded
        for start in range(0, len(ids), n_text)
    ], beginning


def _tokenizer(
    measured: LoadedModel, tokenizer: PreTrainedTokenizerBase | str | Path | None
) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        measured.check_tokenizer(tokenizer, "the tokenizer")
        return tokenizer
    if isinstance(tokenizer, (str, Path)):
        return named_tokenizer(measured, str(tokenizer))
    if tokenizer is not None:
        raise InputError(
            f"a {type(tokenizer).__name__} is no tokenizer of transformers; give one, or the name or folder of one"
        )
    if not measured.checkpoint:
        raise InputError("strings need a tokenizer; give the model's with tokenizer=, or token ids")
    return tokenizer_of(measured)
