"""Predictions of finished models compared on several corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Unpack

from transformers import PreTrainedModel

from normfree.errors import InputError
from normfree.interpret.sequences import ComparedModels, SequenceOptions, token_sequences
from normfree.training.prediction_comparison import PredictionComparison, Text, compare_on


def compare_predictions(
    models: Sequence[str] | Mapping[str, str],
    corpora: Sequence[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = "fp32",
    **sequences: Unpack[SequenceOptions],
) -> PredictionComparison:
    """Loss, entropy, calibration and Jensen-Shannon divergence of each model to the first, by corpus. ::

        found = compare_predictions(["gpt2", "removal/vanilla", "removal/norm-free"], ["file:a.txt", "file:b.txt"])
        found.evaluation
        found.write(Path("comparison"))  # CSV files and figures

    Args:
        models: Hub ids, model folders, GGUF files or runs; or a mapping from names to these.
        corpora: as in :class:`normfree.data.DataConfig`; default: the evaluation data of the first model, a run.
        device, dtype: as for :func:`~normfree.training.load_pretrained`.
        sequences: as for :func:`~normfree.interpret.token_sequences`, for the first model; default: 256 sequences.

    Raises:
        InputError: a model cannot be loaded, the models have different vocabularies, or the sequences do not fit one.
    """
    names = [sequences.pop("corpus", None)] if corpora is None else list(corpora)
    if not names or len(set(names)) < len(names):
        raise InputError(f"the corpora are {', '.join(map(str, names)) or 'none'}; name at least one, and each once")
    sequences.setdefault("n_sequences", 256)
    own: list[SequenceOptions] = [{**sequences, "corpus": name} for name in names]
    compared = ComparedModels.of(models, 256, own[0], device=device, dtype=dtype)
    first = compared.loaded
    read = [compared.sequences, *(token_sequences(first, **options) for options in own[1:])]
    texts = {
        name or f"evaluation data of {first.source}": Text.of(each.tokens, len(each.beginning))
        for name, each in zip(names, read, strict=True)
    }

    def load(source: str) -> PreTrainedModel:
        if source == first.source:
            return first.model
        return compared.load(source).model

    return compare_on(texts, {name: partial(load, source) for name, source in compared.sources.items()})
