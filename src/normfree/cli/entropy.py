"""``normfree entropy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Json,
    Model,
    Tokenizer,
    checked_corpus,
    checked_folder,
    model_name,
    open_console,
    output_folder,
    say_quantized,
)


def entropy(
    model: Model,
    corpus: Annotated[
        str | None,
        typer.Option(help="As for a study; default, for a run: its own evaluation sequences.", callback=checked_corpus),
    ] = None,
    tokenizer: Tokenizer = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="T; default: the run's, or 512 or the model's positions.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV and figures; default entropy/MODEL.", callback=checked_folder)
    ] = None,
    bos: Bos = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Measure the attention entropy of every head of a model: a table, a CSV file a head and layer, a heatmap.

    Example: normfree entropy gpt2 --corpus installed-python --sequence-length 256
    """
    from normfree.interpret import token_sequences
    from normfree.measurement import measure
    from normfree.report import save_figure
    from normfree.training import load_pretrained

    folder = output_folder(out, "entropy", [model])
    measured = load_pretrained(model)
    sequences_read = token_sequences(
        measured,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=sequences,
        cache_dir=cache_dir,
        bos=bos,
    )
    console = open_console(json_)
    name = model_name(model, [model])
    with console.status(str(sequences_read)):
        result = measure(measured, sequences_read.tokens, name=name)
    result.to_csv(folder)
    save_figure(result.plot(), folder, "headwise_entropy")
    if json_:
        read = {"beginning": sequences_read.beginning.summary(), "quantization": measured.quantization}
        print(json.dumps({"folder": str(folder), **read, **result.summary()}))
        return
    console.print(
        f"{name}: attention entropy in nats over {sequences_read}; uniform: of uniform attention to the same keys, at "
        f"most {result.uniform_bound:.3f}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "mean", "min", "max", "uniform", "share of uniform", "sink share", "heads in top band"):
        table.add_column(column, justify="right")
    for row in result.layers.to_dict("records"):
        nats = (f"{row[column]:.3f}" for column in ("mean_nats", "min_nats", "max_nats", "uniform_nats"))
        shares = (f"{100 * row[column]:.1f} %" for column in ("share_of_uniform", "sink_share"))
        table.add_row(str(row["layer"]), *nats, *shares, f"{row['top_band_heads']} of {row['n_head']}")
    console.print(table)
    for module, reason in result.unreadable.items():
        console.print(f"not read: {module}: {reason}", highlight=False, soft_wrap=True)
    if measured.quantization is not None:
        say_quantized(console, {name: measured.quantization})
    console.print(f"Files: {folder}", highlight=False, soft_wrap=True)
