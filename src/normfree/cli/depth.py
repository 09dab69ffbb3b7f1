"""``normfree depth``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from normfree.cli.console import open_console, say_quantized
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Compared,
    ComparedCorpus,
    ComparedLength,
    ComparedTokenizer,
    Json,
    checked_folder,
)
from normfree.errors import InputError


def depth(
    models: Compared,
    corpus: ComparedCorpus = None,
    tokenizer: ComparedTokenizer = None,
    sequence_length: ComparedLength = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 32,
    probes: Annotated[int, typer.Option(help="Random vectors a sequence for each Jacobian.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in memory at once.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for CSV files, figures and the report; default depth/MODEL.", callback=checked_folder
        ),
    ] = None,
    bos: Bos = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Which layers of a model do little: variance, skipped layers, angular distance, Jacobians, gradients.

    See docs/models.md for the models it takes, and docs/depth.md for what each number means.

    Example: normfree depth openai-community/gpt2 --corpus file:text.txt --sequence-length 256
    """
    from normfree.interpret import check_same_tokens, measure_depth, token_sequences
    from normfree.studies.depth import write_depth_page
    from normfree.training import load_pretrained
    from normfree.training.pretrained import quantizations

    if len(set(models)) < len(models):
        raise InputError("a model is named twice; name each once")
    folder = output_folder(out, "depth", models)
    console = open_console(json_)
    measured = load_pretrained(models[0])
    first = measured.checkpoint
    sequences_read = token_sequences(
        measured,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=sequences,
        cache_dir=cache_dir,
        bos=bos,
    )
    found = {}
    for source in models:
        if measured.source != source:
            measured = load_pretrained(source)  # one model at a time in memory
            check_same_tokens(first, measured.checkpoint)
        name = model_name(source, models)
        with console.status(f"{name}: {sequences_read}"):
            found[name] = measure_depth(
                measured.model,
                sequences_read.tokens,
                n_probe=probes,
                batch_size=batch_size,
                n_beginning=len(sequences_read.beginning),
            )
    weights = quantizations({model_name(source, models): source for source in models})
    command = f"normfree depth {' '.join(models)}"
    table = write_depth_page(found, folder, command, sequences=str(sequences_read), quantized=weights)
    if json_:
        frames = {name: each.frames() for name, each in found.items()}
        rows = {
            name: {key: json.loads(frame.to_json(orient="records", double_precision=9)) for key, frame in each.items()}
            for name, each in frames.items()
        }
        read = {"beginning": sequences_read.beginning.summary(), "quantization": weights}
        print(json.dumps({"folder": str(folder), **read, "models": rows}))
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = {
        "layers": "{n_layer}",
        "loss, nats": "{loss_nats:.3f}",
        "effective depth": "{effective_depth:.2f} ± {effective_depth_standard_error:.2f}",
        "deep half": "{deep_half_share:.1%}",
        "deep layer, nats": "{deep_layer_nats:.4f}",
        "variance grows": "{variance_growth}",
        "last / first": "{variance_ratio:.3g}",
    }
    shown.add_column("model")
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        values = {str(key): value for key, value in row.items()}
        shown.add_row(str(row["model"]), *(form.format(**values) for form in columns.values()))
    console.print(shown)
    console.print(f"Read on {sequences_read}", highlight=False)
    say_quantized(console, weights)
    for row in table[table["nonfinite_entries"] > 0].to_dict("records"):
        console.print(
            f"{row['model']}: {row['nonfinite_entries']:,} entries of the residual stream are NaN or infinite",
            highlight=False,
        )
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
