"""The token sequences that a finished model is measured on: a run's own, or those of a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from normfree.data import Beginning, corpus_sequences, load_tokenizer, same_data
from normfree.data.beginning import BeginningRule
from normfree.errors import InputError
from normfree.files import DEFAULT_CACHE_DIR
from normfree.modeling.gguf import is_gguf
from normfree.training import LoadedModel, load_pretrained

DEFAULT_SEQUENCE_LENGTH = 512
WRONG_TOKENIZER = "give the tokenizer that the model was trained with"


@dataclass(frozen=True)
class TokenSequences:
    """Sequences to measure on.

    tokens: int64 [n, T], no padding; each begins with the tokens of ``beginning``.
    beginning: those tokens, and the rule they come from.
    """

    tokens: torch.Tensor
    beginning: Beginning

    def __str__(self) -> str:
        n, T = self.tokens.shape
        return f"{n} sequences of {T} tokens ({self.beginning})"


class SequenceOptions(TypedDict, total=False):
    """The options of :func:`token_sequences`."""

    corpus: str | None
    tokenizer: str | None
    sequence_length: int | None
    n_sequences: int
    cache_dir: Path
    bos: bool | None


class NoTokenizerError(InputError):
    """No tokenizer is saved with a model."""


@dataclass
class ComparedModels:
    """Models that read the same sequences; iteration loads one at a time.

    sources: by name.
    loaded: the model loaded last; before iteration the first, whose tokenizer made ``sequences``.
    device, dtype: as for :func:`~normfree.training.load_pretrained`.
    quantization: how weights were quantized, by name, of the models loaded so far; models without are left out.
    loaded_as: device, dtype and, of a model from the Hub, commit, of the models loaded so far.
    """

    sources: Mapping[str, str]
    loaded: LoadedModel
    sequences: TokenSequences
    device: str | None = None
    dtype: str | None = None
    quantization: dict[str, str] = field(default_factory=dict)
    loaded_as: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        models: Sequence[str] | Mapping[str, str],
        default_n: int,
        options: SequenceOptions,
        *,
        device: str | None = None,
        dtype: str | None = None,
    ) -> ComparedModels:
        """``models``, by name or each its own name, with sequences for the first.

        Args:
            models: sources, or sources by name.
            default_n: how many sequences if ``options`` do not say.
            options: of :func:`token_sequences`.
            device, dtype: as for :func:`~normfree.training.load_pretrained`.

        Raises:
            InputError: a model is named twice, there is none, or the first or its sequences cannot be loaded.
        """
        if not models:
            raise InputError("no model is named; name at least one")
        if len(set(models)) < len(models):
            raise InputError("a model is named twice; name each once")
        sources = dict(models) if isinstance(models, Mapping) else {source: source for source in models}
        first = load_pretrained(next(iter(sources.values())), device=device, dtype=dtype)
        options.setdefault("n_sequences", default_n)
        return cls(sources, first, token_sequences(first, **options), device, dtype)

    def __iter__(self) -> Iterator[tuple[str, LoadedModel]]:
        """Each model with its name.

        Raises:
            InputError: see :meth:`load`.
        """
        for name, source in self.sources.items():
            if source != self.loaded.source:
                self.loaded = self.load(source)
            self.loaded_as[name] = self.loaded.loaded_as
            if self.loaded.quantization is not None:
                self.quantization[name] = self.loaded.quantization
            yield name, self.loaded

    def load(self, source: str) -> LoadedModel:
        """Another model of the comparison.

        Raises:
            InputError: it cannot be loaded, has another vocabulary than the first, or is too short for the sequences.
        """
        loaded = load_pretrained(source, device=self.device, dtype=self.dtype)
        check_same_tokens(self.loaded.checkpoint, loaded.checkpoint)
        T, n_positions = self.sequences.tokens.shape[1], loaded.n_positions
        if n_positions is not None and n_positions < T:
            raise InputError(f"{source} has {n_positions} positions, and the sequences {T} tokens; use shorter ones")
        return loaded


def tokenizer_of(measured: LoadedModel) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the model; every checkpoint of a run has one.

    Raises:
        NoTokenizerError: there is none.
        InputError: it has tokens without an embedding, or is in a GGUF file and cannot be read.
    """
    try:
        tokenizer = load_tokenizer(measured.checkpoint)
    except InputError as error:
        if is_gguf(measured.checkpoint):
            raise
        missing = f"no tokenizer is saved with {measured.source}; name the one it was trained with"
        raise NoTokenizerError(missing) from error
    measured.check_tokenizer(tokenizer, "the tokenizer saved with it")
    return tokenizer


def check_same_tokens(first: str, other: str) -> None:
    """Checks that two models to compare have the same vocabulary, if both have a tokenizer.

    Args:
        first: ``LoadedModel.checkpoint`` of the model whose tokenizer made the sequences.
        other: that of another model that reads them.

    Raises:
        InputError: their vocabularies differ.
    """
    try:
        one, two = load_tokenizer(first), load_tokenizer(other)
    except InputError:
        return
    if one.get_vocab() != two.get_vocab():
        raise InputError(
            f"{first} and {other} have tokenizers of other vocabularies ({len(one)} and {len(two)} "
            "tokens), and models are compared on the same tokens; measure them apart"
        )


def named_tokenizer(measured: LoadedModel, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer ``name``, once it fits the model and agrees with the tokenizer saved with it, if one is."""
    tokenizer = load_tokenizer(name)
    measured.check_tokenizer(tokenizer, f"tokenizer {name!r}")
    try:
        own = load_tokenizer(measured.checkpoint) if measured.checkpoint else tokenizer
    except InputError:
        return tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"tokenizer {name!r} has another vocabulary ({len(tokenizer)} tokens) than the one saved with "
            f"{measured.source} ({len(own)}); leave --tokenizer out"
        )
    return tokenizer


def token_sequences(
    measured: LoadedModel,
    *,
    corpus: str | None = None,
    tokenizer: str | None = None,
    sequence_length: int | None = None,
    n_sequences: int = 32,
    cache_dir: Path = DEFAULT_CACHE_DIR,
    bos: bool | None = None,
) -> TokenSequences:
    """The first ``n_sequences`` sequences to measure on: int64 [n_sequences, T], each from within one document.

    Without ``corpus`` they are a run's own evaluation sequences. Sequences of a run begin as those it was trained on;
    those of any other model with what its tokenizer puts before a text.

    Args:
        measured: the model that will read them.
        corpus: as in :class:`normfree.data.DataConfig`; may be None for a run.
        tokenizer: a Hugging Face tokenizer's name or folder; default: the run's, or the one saved with the model.
        sequence_length: T; default: the run's, or 512, or the model's positions if fewer.
        n_sequences: at least 1.
        cache_dir: where the data of runs are prepared.
        bos: whether sequences begin with a beginning-of-text token; default: as above.

    Raises:
        InputError: no corpus or tokenizer, too long sequences, too few of them, or tokens that the model lacks.
    """
    T = default_sequence_length(measured) if sequence_length is None else sequence_length
    if T < 2 or n_sequences < 1:
        raise InputError(f"need at least 1 sequence of at least 2 tokens, got {n_sequences} of {T}")
    if measured.n_positions is not None and measured.n_positions < T:
        raise InputError(
            f"sequence length {T} is more than the {measured.n_positions} positions of {measured.source}; "
            f"give at most {measured.n_positions}"
        )
    if corpus is None:
        tokens, beginning = _own_sequences(measured, tokenizer, T, cache_dir, bos)
        where = f"the evaluation data of {measured.source}"
    else:
        reader = named_tokenizer(measured, tokenizer) if tokenizer is not None else tokenizer_of(measured)
        beginning = Beginning.of(reader, beginning_rule(measured, bos))
        tokens = corpus_sequences(corpus, reader, T, n_sequences, beginning)
        where = f"corpus {corpus!r}"
    if len(tokens) < n_sequences:
        raise InputError(
            f"{where} has {len(tokens)} sequences of {T} tokens from within one document, {n_sequences} are asked "
            "for; use a larger corpus, shorter sequences or fewer of them"
        )
    check_vocabulary(measured, tokens[:n_sequences])
    return TokenSequences(tokens[:n_sequences], beginning)


def check_vocabulary(measured: LoadedModel, sequences: Iterable[torch.Tensor]) -> None:
    """Checks that the model has an embedding for every token of ``sequences``, int64 [T_i].

    Raises:
        InputError: it lacks one.
    """
    for i, row in enumerate(sequences):
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= measured.n_embedding:
            raise InputError(
                f"sequence {i} has token {low if low < 0 else high}, the vocabulary of {measured.source} is 0 to "
                f"{measured.n_embedding - 1}; {WRONG_TOKENIZER}"
            )


def beginning_rule(measured: LoadedModel, bos: bool | None) -> BeginningRule:
    """How sequences begin: as ``bos`` says, else as those of the run, else as the model's tokenizer has it."""
    if bos is not None:
        return "bos_token" if bos else "none"
    return "tokenizer" if measured.data is None else measured.data.beginning


def default_sequence_length(measured: LoadedModel) -> int:
    """T of a run's own sequences; for other models 512, or their positions if fewer."""
    if measured.data is not None:
        return measured.data.sequence_length
    return min(DEFAULT_SEQUENCE_LENGTH, measured.n_positions or DEFAULT_SEQUENCE_LENGTH)


def _own_sequences(
    measured: LoadedModel, tokenizer: str | None, sequence_length: int, cache_dir: Path, bos: bool | None
) -> tuple[torch.Tensor, Beginning]:
    if measured.data is None or measured.fingerprint is None:
        raise InputError(f"{measured.source} is no run with data of its own; name a corpus to measure on (--corpus)")
    if tokenizer is not None:
        raise InputError("a run's own evaluation data have their tokenizer; name a corpus, or leave the tokenizer out")
    if measured.data.sequence_length != sequence_length:
        raise InputError(
            f"the evaluation data of {measured.source} are sequences of {measured.data.sequence_length} tokens, "
            f"not {sequence_length}; name a corpus to measure on other lengths"
        )
    if bos is not None:
        raise InputError("a run's own evaluation sequences begin as they do; name a corpus, or leave --bos out")
    data = same_data(measured.data, cache_dir, measured.fingerprint)
    return data.eval.whole()[0], Beginning.of(data.tokenizer, measured.data.beginning)
