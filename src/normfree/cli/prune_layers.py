"""``normfree prune-layers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Json,
    Model,
    Tokenizer,
    checked_corpus,
    checked_folder,
    numbers,
    open_console,
    say_quantized,
)
from normfree.errors import InputError


def prune_layers(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder for the pruned model; must not hold anything yet.", callback=checked_folder)
    ],
    drop: Annotated[str | None, typer.Option(help="Layers to drop, counted from 0, e.g. 8,9,10.")] = None,
    drop_last: Annotated[int | None, typer.Option(help="Drop so many of the last layers.")] = None,
    drop_similar: Annotated[
        int | None,
        typer.Option(help="Drop so many consecutive layers, those across which the angular distance is smallest."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="For --drop-similar, as for a study; default, for a run: its own sequences.", callback=checked_corpus
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    sequence_length: Annotated[int | None, typer.Option(help="T, for --drop-similar; default: the model's.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences for --drop-similar.")] = 32,
    bos: Bos = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Export a model without some of its layers, for transformers to load.

    Example: normfree prune-layers openai-community/gpt2 --drop 8,9,10 --out gpt2-without-8-9-10
    """
    from normfree.interpret import (
        NoTokenizerError,
        export_pruned,
        measure_angular_distance,
        most_similar_block,
        token_sequences,
        tokenizer_of,
    )
    from normfree.probes.residual_stream import decoder_blocks
    from normfree.training import load_pretrained

    if sum(choice is not None for choice in (drop, drop_last, drop_similar)) != 1:
        raise InputError("give exactly one of --drop, --drop-last and --drop-similar")
    if drop_similar is None and (corpus, sequence_length, bos) != (None, None, None):
        raise InputError("--corpus, --sequence-length and --bos are for --drop-similar; leave them out")
    sequences_read = None
    chosen = numbers("--drop", drop, "8,9,10") if drop is not None else []
    console = open_console(json_)
    loaded = load_pretrained(model)
    n_layer = len(decoder_blocks(loaded.model))
    if drop_last is not None:
        if not 0 < drop_last < n_layer:
            raise InputError(f"cannot drop the last {drop_last} of {n_layer} layers; drop 1 to {n_layer - 1}")
        chosen = list(range(n_layer - drop_last, n_layer))
    if drop_similar is not None:
        sequences_read = token_sequences(
            loaded,
            corpus=corpus,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            n_sequences=sequences,
            cache_dir=cache_dir,
            bos=bos,
        )
        chosen = most_similar_block(measure_angular_distance(loaded.model, sequences_read.tokens), drop_similar)
    try:
        reader = tokenizer_of(loaded)
    except NoTokenizerError:
        reader = None  # a model without one is as good
    pruned = export_pruned(loaded.model, chosen, out, source=model, tokenizer=reader)
    result = {
        "folder": str(out),
        "dropped_layers": sorted(chosen),
        "n_layer": n_layer - len(chosen),
        "parameters": pruned.num_parameters(),
        "parameters_before": loaded.model.num_parameters(),
        "tokenizer": reader is not None,
        "quantization": loaded.quantization,
    }
    if sequences_read is not None:
        result["beginning"] = sequences_read.beginning.summary()
    if json_:
        print(json.dumps(result))
        return
    console.print(
        f"Dropped {len(chosen)} of {n_layer} layers ({', '.join(map(str, sorted(chosen)))}): "
        f"{result['parameters_before']:,} parameters before, {result['parameters']:,} now"
        + ("" if sequences_read is None else f"; chosen on {sequences_read}")
        + ("" if reader is not None else "; no tokenizer was saved with the model"),
        highlight=False,
        soft_wrap=True,
    )
    if loaded.quantization is not None:
        say_quantized(console, {model: loaded.quantization})
    console.print(f"Model: {out}", highlight=False, soft_wrap=True)
