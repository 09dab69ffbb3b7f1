"""``normfree interpret``."""

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


def interpret(
    models: Compared,
    corpus: ComparedCorpus = None,
    tokenizer: ComparedTokenizer = None,
    sequence_length: ComparedLength = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with clean, corrupted, answer, wrong_answer; default: induction prompts."),
    ] = None,
    neurons: Annotated[int, typer.Option(help="Candidate confidence neurons to ablate.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for CSV files, figures and the report; default interpretation/MODEL.", callback=checked_folder
        ),
    ] = None,
    bos: Bos = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Direct logit attribution, patching, confidence neurons and sinks, of models with and without norms.

    Example: normfree interpret removal/vanilla removal/norm-free --corpus installed-python
    """
    from normfree.interpret import check_same_tokens, induction_pairs, read_prompts, token_sequences, tokenizer_of
    from normfree.studies.interpretation import interpret as interpret_model
    from normfree.studies.interpretation import write_interpretation
    from normfree.training import load_pretrained
    from normfree.training.pretrained import quantizations

    folder = output_folder(out, "interpretation", models)
    console = open_console(json_)
    loaded = {model_name(each, models): load_pretrained(each) for each in models}
    first = next(iter(loaded.values()))
    for each in loaded.values():
        check_same_tokens(first.checkpoint, each.checkpoint)
    sequences_read = token_sequences(
        first,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=sequences,
        cache_dir=cache_dir,
        bos=bos,
    )
    beginning = sequences_read.beginning
    if len(beginning) > 1:
        raise InputError(
            f"sequences of {models[0]} begin with {' '.join(beginning.tokens)}, and the tools here predict all tokens "
            "but the first; give --no-bos"
        )
    if prompts is not None:
        pairs = read_prompts(prompts, tokenizer_of(first), beginning)
    else:
        pairs = induction_pairs(sequences_read.tokens, max(1, sequences // 2), n_beginning=len(beginning))
    found = {}
    for name, each in loaded.items():
        with console.status(f"{name}: {sequences_read}, {len(pairs.answers)} prompts, {neurons} neurons"):
            found[name] = interpret_model(each.as_normfree(), sequences_read.tokens, pairs, n_neuron=neurons)
    weights = quantizations({model_name(source, models): source for source in models})
    command = f"normfree interpret {' '.join(models)}"
    table = write_interpretation(found, folder, command, sequences=str(sequences_read), quantized=weights)
    if json_:
        rows = json.loads(table.to_json(orient="records", double_precision=9))
        read = {"beginning": beginning.summary(), "quantization": weights}
        print(json.dumps({"folder": str(folder), **read, "summary": rows}))
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        shown.add_column(column.replace("_", " "), justify="left" if column == "model" else "right")
    for row in table.to_dict("records"):
        shown.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    console.print(shown)
    console.print(f"Read on {sequences_read}", highlight=False)
    say_quantized(console, weights)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
