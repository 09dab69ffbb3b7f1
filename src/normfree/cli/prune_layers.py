"""``normfree prune-layers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.console import open_console, print_json, say, say_origin
from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    Tokenizer,
    at_revision,
    checked_corpus,
    checked_folder,
    numbers,
)

Out = Annotated[
    Path, typer.Option(help="Folder for the pruned model; must not hold anything yet.", callback=checked_folder)
]
DropSimilar = Annotated[
    int | None,
    typer.Option(help="Drop so many consecutive layers, those across which the angular distance is smallest."),
]
Corpus = Annotated[
    str | None,
    typer.Option(
        help="For --drop-similar, as for a study; default, for a run: its own sequences.", callback=checked_corpus
    ),
]


def prune_layers(
    model: Model,
    out: Out,
    drop: Annotated[str | None, typer.Option(help="Layers to drop, counted from 0, e.g. 8,9,10.")] = None,
    drop_last: Annotated[int | None, typer.Option(help="Drop so many of the last layers.")] = None,
    drop_similar: DropSimilar = None,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    sequence_length: Annotated[int | None, typer.Option(help="T, for --drop-similar; default: the model's.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences for --drop-similar.")] = 32,
    bos: Bos = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Export a model without some of its layers, for transformers to load.

    Example: normfree prune-layers openai-community/gpt2 --drop 8,9,10 --out gpt2-without-8-9-10
    """
    from normfree.exports import export_without_layers

    (model,) = at_revision([model], revision)
    console = open_console(json_)
    pruned = export_without_layers(
        model,
        out,
        drop=None if drop is None else numbers("--drop", drop, "8,9,10"),
        drop_last=drop_last,
        drop_similar=drop_similar,
        device=device,
        dtype=dtype,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=sequences,
        bos=bos,
        cache_dir=cache_dir,
    )
    read, dropped = pruned.sequences, pruned.dropped_layers
    if json_:
        names = ("dropped_layers", "n_layer", "parameters", "parameters_before", "quantization", "loaded_as")
        beginning = {} if read is None else {"beginning": read.beginning.summary()}
        found = {name: getattr(pruned, name) for name in names} | {"tokenizer": pruned.has_tokenizer}
        print_json(folder=str(out), **found, **beginning)
        return
    say(
        console,
        f"Dropped {len(dropped)} of {len(dropped) + pruned.n_layer} layers ({', '.join(map(str, dropped))}): "
        f"{pruned.parameters_before:,} parameters before, {pruned.parameters:,} now"
        + ("" if read is None else f"; chosen on {read}")
        + ("" if pruned.has_tokenizer else "; no tokenizer was saved with the model"),
    )
    say_origin(console, {model: pruned.quantization}, {model: pruned.loaded_as})
    say(console, f"Model: {out}")
