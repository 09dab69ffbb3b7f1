"""Models made of finished ones and written to folders: without some layers, or sparse, to train from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from normfree.errors import InputError
from normfree.files import folder_written_whole
from normfree.interpret import (
    NoTokenizerError,
    TokenSequences,
    export_pruned,
    measure_angular_distance,
    most_similar_block,
    token_sequences,
    tokenizer_of,
)
from normfree.interpret.sequences import SequenceOptions
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.spark import to_spark
from normfree.training import LoadedModel, load_pretrained


@dataclass(frozen=True)
class ExportedModel:
    """A model written to ``folder``.

    parameters, parameters_before: of the model written, and of the one it was made from.
    quantization: how the weights of the latter were quantized; None if they were not.
    loaded_as: its ``device``, ``dtype`` and, if it is of the Hub, ``commit``.
    """

    folder: Path
    parameters: int
    parameters_before: int
    quantization: str | None
    loaded_as: Mapping[str, str]


@dataclass(frozen=True)
class PrunedModel(ExportedModel):
    """A model without ``dropped_layers`` (from 0, in order); ``n_layer`` are left.

    has_tokenizer: whether a tokenizer was saved with it.
    sequences: what similar layers were chosen on; None for layers that were named.
    """

    dropped_layers: list[int]
    n_layer: int
    has_tokenizer: bool
    sequences: TokenSequences | None


def export_without_layers(
    source: str,
    folder: Path,
    *,
    drop: Sequence[int] | None = None,
    drop_last: int | None = None,
    drop_similar: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **sequences: Unpack[SequenceOptions],
) -> PrunedModel:
    """Writes the model ``source`` without some of its layers to ``folder``, whole or not at all.

    Args:
        source: a Hub id, a model folder, a ``.gguf`` file, or a run or checkpoint folder.
        folder: must not hold anything.
        drop, drop_last, drop_similar: exactly one of: layers from 0; how many of the last; how many consecutive ones,
            those across which the angular distance is smallest (:func:`~normfree.interpret.most_similar_block`).
        device, dtype: as for :func:`~normfree.training.load_pretrained`; the model is written in ``dtype``.
        sequences: what ``drop_similar`` is measured on; see :func:`~normfree.interpret.token_sequences`.

    Raises:
        InputError: not exactly one choice is given, the layers cannot be dropped (see
            :func:`~normfree.interpret.prune_layers`), or the model, the corpus or the folder cannot be used.
    """
    if sum(choice is not None for choice in (drop, drop_last, drop_similar)) != 1:
        raise InputError("give exactly one of --drop, --drop-last and --drop-similar")
    if drop_similar is None and any(sequences.get(name) is not None for name in ("corpus", "sequence_length", "bos")):
        raise InputError("--corpus, --sequence-length and --bos are for --drop-similar; leave them out")
    loaded = load_pretrained(source, device=device, dtype=dtype)
    n_layer = len(decoder_blocks(loaded.model))
    read = None
    if drop is not None:
        chosen = list(drop)
    elif drop_last is not None:
        if not 0 < drop_last < n_layer:
            raise InputError(f"cannot drop the last {drop_last} of {n_layer} layers; drop 1 to {n_layer - 1}")
        chosen = list(range(n_layer - drop_last, n_layer))
    else:
        assert drop_similar is not None
        read = token_sequences(loaded, **sequences)
        chosen = most_similar_block(measure_angular_distance(loaded.model, read.tokens), drop_similar)
    saved_tokenizer = _tokenizer_or_none(loaded)
    pruned = export_pruned(loaded.model, chosen, folder, source=source, tokenizer=saved_tokenizer)
    return PrunedModel(
        folder,
        pruned.num_parameters(),
        loaded.model.num_parameters(),
        loaded.quantization,
        loaded.loaded_as,
        dropped_layers=sorted(chosen),
        n_layer=n_layer - len(chosen),
        has_tokenizer=saved_tokenizer is not None,
        sequences=read,
    )


def export_spark(
    source: str, folder: Path, *, device: str | None = None, dtype: str | None = None, **options: Any
) -> ExportedModel:
    """Writes a sparse model that starts from the dense one ``source``, with its tokenizer, to ``folder``.

    Args:
        source: a Hub id, a model folder, a ``.gguf`` file, or a run or checkpoint folder.
        folder: must not hold anything.
        device, dtype: as for :func:`~normfree.training.load_pretrained`; the model is written in ``dtype``.
        options: of :func:`~normfree.spark.to_spark`.

    Raises:
        InputError: the model cannot be converted, an option does not fit, no tokenizer is saved with the model, or
            ``folder`` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; give another folder with --out")
    loaded = load_pretrained(source, device=device, dtype=dtype)
    dense = loaded.as_normfree()
    tokenizer = tokenizer_of(loaded)
    spark = to_spark(dense, **options)
    with folder_written_whole(folder) as temporary:
        spark.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    sizes = spark.num_parameters(), dense.num_parameters()
    return ExportedModel(folder, *sizes, loaded.quantization, loaded.loaded_as)


def _tokenizer_or_none(loaded: LoadedModel) -> Any:
    try:
        return tokenizer_of(loaded)
    except NoTokenizerError:
        return None
