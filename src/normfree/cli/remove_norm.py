"""``normfree remove-norm``."""

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
    changes,
    checked_corpus,
    checked_folder,
    model_name,
    open_console,
    output_folder,
    quantized,
    say_quantized,
)
from normfree.locks import locked
from normfree.processes import check_alone


def remove_norm(
    model: Model,
    corpus: Annotated[
        str | None, typer.Option(help="As for a study; default, for a run: its own.", callback=checked_corpus)
    ] = None,
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and models; default removal/MODEL.", callback=checked_folder)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (published, with their recipe) or a YAML file; "
            "default: by depth and budget."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Fine-tuning budget, in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Fine-tuning budget, in optimizer steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data and of dropout.")] = 0,
    lora: Annotated[
        int | None,
        typer.Option(min=1, help="Train low-rank changes of this rank, and the norms; the other weights are frozen."),
    ] = None,
    vanilla: Annotated[bool, typer.Option(help="Also fine-tune with the norms kept, as a control.")] = True,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change any value, e.g. --set recipe.learning_rate=3e-4. Can be repeated."),
    ] = None,
    bos: Bos = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Take every LayerNorm or RMSNorm out of a trained model by fine-tuning, and export it without any.

    A stopped removal resumes when the same command is given again.

    Example: normfree remove-norm studies/relu-revival-cpu/runs/sm-ln-g/seed-0
    """
    from normfree.data import Beginning
    from normfree.removal import remove
    from normfree.removal.plan import plan
    from normfree.removal.schedule import load_schedule
    from normfree.training import StudyProgress

    check_alone("normfree remove-norm", "leave the launcher out: its statistics would be those of one of them")
    folder = output_folder(out, "removal", [model])
    wanted = changes(set_, tokens=tokens, steps=steps, corpus=corpus, tokenizer=tokenizer, bos=bos)
    chosen = load_schedule(schedule) if schedule is not None else None
    planned = plan(model, changes=wanted, seed=seed, lora_rank=lora, schedule=chosen)
    console = open_console(json_)
    data = planned.prepare_data(cache_dir, progress=console.is_terminal)
    run = planned.run
    total = run.recipe.n_tokens(run.data.sequence_length) * (2 if vanilla else 1)
    with locked(folder), StudyProgress(total, console=console, description="remove-norm") as progress:
        result = remove(
            run,
            data,
            folder,
            chosen,
            vanilla=vanilla,
            callbacks=lambda variant, n_tokens: (progress.run(variant, n_tokens),),
        )
    beginning = Beginning.of(data.tokenizer, run.data.beginning)
    name = model_name(model, [model])
    weights = quantized({name: model})
    if json_:
        exports = {"norm_free": str(result.norm_free), "stock": str(result.stock) if result.stock else None}
        rows = json.loads(result.table.to_json(orient="records", double_precision=9))
        read = {"beginning": beginning.summary(), "quantization": weights.get(name)}
        print(json.dumps({"folder": str(folder), **read, **exports, "table": rows}))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("variant", "fine-tuning tokens", "loss, nats", "perplexity", "Δ loss"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in result.table.to_dict("records"):
        numbers = (f"{row['eval_loss']:.4f}", f"{row['eval_ppl']:.2f}", f"{row['delta_loss']:+.4f}")
        table.add_row(row["variant"], f"{row['finetuning_tokens']:,}", *numbers)
    console.print(table)
    console.print(f"Sequences of {run.data.sequence_length} tokens, {beginning}", highlight=False)
    say_quantized(console, weights)
    console.print(f"Without norms: {result.norm_free}", highlight=False, soft_wrap=True)
    if result.stock is not None:
        console.print(f"As a stock model: {result.stock}", highlight=False, soft_wrap=True)
