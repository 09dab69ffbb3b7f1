"""``normfree prune-layers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normfree.cli.console import open_console, print_json, say, say_origin
from normfree.cli.options import Json, Model, checked_folder, numbers
from normfree.cli.shared_options import reads_sequences

Out = Annotated[
    Path, typer.Option(help="Folder for the pruned model; must not hold anything yet.", callback=checked_folder)
]
DropSimilar = Annotated[
    int | None,
    typer.Option(help="Drop so many consecutive layers, those across which the angular distance is smallest."),
]


@reads_sequences(32, "choose layers by --drop-similar on")
def prune_layers(
    model: Model,
    out: Out,
    drop: Annotated[str | None, typer.Option(help="Layers to drop, counted from 0, e.g. 8,9,10.")] = None,
    drop_last: Annotated[int | None, typer.Option(help="Drop so many of the last layers.")] = None,
    drop_similar: DropSimilar = None,
    json_: Json = False,
    **reading: Any,
) -> None:
    """Export a model without some of its layers, for transformers to load.

    Example: normfree prune-layers openai-community/gpt2 --drop 8,9,10 --out gpt2-without-8-9-10
    """
    from normfree.exports import export_without_layers

    console = open_console(json_)
    pruned = export_without_layers(
        model,
        out,
        drop=None if drop is None else numbers("--drop", drop, "8,9,10"),
        drop_last=drop_last,
        drop_similar=drop_similar,
        **reading,
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
