"""``normfree remove-norm``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from normfree.cli.console import open_console, print_json, records, say, say_origin, table
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Device,
    Json,
    Model,
    Precision,
    Revision,
    Seed,
    Set,
    Tokenizer,
    at_revision,
    changes,
    checked_corpus,
    checked_folder,
)
from normfree.columns import EVAL_LOSS, EVAL_PPL
from normfree.processes import check_alone

if TYPE_CHECKING:
    from normfree.removal.from_pretrained import PretrainedRemoval


Corpus = Annotated[
    str | None, typer.Option(help="As for a study; default, for a run: its own.", callback=checked_corpus)
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for runs and models; default removal/MODEL.", callback=checked_folder)
]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (published, with their recipe) or a YAML file; "
        "default: by depth and budget."
    ),
]
Lora = Annotated[
    int | None,
    typer.Option(min=1, help="Train low-rank changes of this rank, and the norms; the other weights are frozen."),
]


def remove_norm(
    model: Model,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    schedule: Schedule = None,
    tokens: Annotated[int | None, typer.Option(help="Fine-tuning budget, in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Fine-tuning budget, in optimizer steps.")] = None,
    seed: Seed = 0,
    lora: Lora = None,
    vanilla: Annotated[bool, typer.Option(help="Also fine-tune with the norms kept, as a control.")] = True,
    set_: Set = None,
    bos: Bos = None,
    device: Device = None,
    dtype: Precision = None,
    revision: Revision = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Take every LayerNorm or RMSNorm out of a trained model by fine-tuning, and export it without any.

    A stopped removal resumes when the same command is given again.

    Example: normfree remove-norm studies/relu-revival-cpu/runs/sm-ln-g/seed-0
    """
    from normfree.removal.from_pretrained import remove_from_pretrained

    check_alone("normfree remove-norm", "leave the launcher out: its statistics would be those of one of them")
    (model,) = at_revision([model], revision)
    folder, name = output_folder(out, "removal", [model]), model_name(model, [model])
    wanted = changes(set_, tokens=tokens, steps=steps, corpus=corpus, tokenizer=tokenizer, bos=bos, dtype=dtype)
    console = open_console(json_)
    removal = remove_from_pretrained(
        model,
        folder,
        changes=wanted,
        schedule=schedule,
        seed=seed,
        lora_rank=lora,
        vanilla=vanilla,
        device=device,
        cache_dir=cache_dir,
    )
    if json_:
        read = {"beginning": removal.beginning.summary(), "quantization": removal.quantization}
        stock = None if removal.result.stock is None else str(removal.result.stock)
        exports = {"norm_free": str(removal.result.norm_free), "stock": stock}
        print_json(folder=str(folder), **read, **exports, table=records(removal.result.table))
        return
    _show(removal, name, console)


def _show(removal: PretrainedRemoval, name: str, console: Console) -> None:
    result = removal.result
    form = {"finetuning_tokens": ",", EVAL_LOSS: ".4f", EVAL_PPL: ".2f", "delta_loss": "+.4f"}
    rows = (
        (row["variant"], *(format(row[column], how) for column, how in form.items()))
        for row in result.table.to_dict("records")
    )
    console.print(table(("variant", "fine-tuning tokens", "loss, nats", "perplexity", "Δ loss"), rows, n_left=1))
    say(console, f"Sequences of {removal.run.data.sequence_length} tokens, {removal.beginning}")
    say_origin(console, {name: removal.quantization})
    say(console, f"Without norms: {result.norm_free}")
    if result.stock is not None:
        say(console, f"As a stock model: {result.stock}")
