"""``normfree finetune``."""

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
    changes,
    checked_corpus,
    checked_folder,
    open_console,
    quantized,
    say_quantized,
)


def finetune(
    model: Model,
    corpus: Annotated[
        str,
        typer.Option(
            help="pairs:FILE.jsonl, with a prompt and a completion a line; or as for a study.", callback=checked_corpus
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder.", callback=checked_folder)],
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the training split.")] = 3.0,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens, in place of epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in optimizer steps, in place of epochs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data and of dropout.")] = 0,
    lora: Annotated[int | None, typer.Option(min=1, help="Train low-rank changes of this rank only.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change any value, e.g. --set recipe.learning_rate=3e-5. Can be repeated."),
    ] = None,
    bos: Bos = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Fine-tune a trained model on prompts and completions; only the completions are predicted.

    A stopped run resumes from its last checkpoint when the same command is given again.

    Example: normfree finetune studies/curse-of-depth-cpu/runs/pre-ln/seed-0 --corpus pairs:pairs.jsonl --out runs/tuned
    """
    from normfree.data import Beginning
    from normfree.processes import is_main_process, main_first
    from normfree.training import StudyProgress, load_pretrained, train
    from normfree.training.finetuning import finetuning_run

    wanted = changes(set_, tokens=tokens, steps=steps, corpus=corpus, tokenizer=None, bos=bos)
    console = open_console(json_)
    run, data = main_first(
        lambda: finetuning_run(
            load_pretrained(model),
            cache_dir,
            changes=wanted,
            epochs=epochs,
            seed=seed,
            lora_rank=lora,
            progress=console.is_terminal,
        )
    )
    n_tokens = run.recipe.n_tokens(run.data.sequence_length)
    with StudyProgress(n_tokens, console=console, description="finetune") as progress:
        row = train(run, data, out, callbacks=(progress.run(model, n_tokens),)).row
    beginning = Beginning.of(data.tokenizer, run.data.beginning)
    weights = quantized({model: model})
    if json_:
        if is_main_process():
            read = {"beginning": beginning.summary(), "quantization": weights.get(model)}
            print(json.dumps({"folder": str(out), **read, **row}))
        return
    say_quantized(console, weights)
    console.print(
        f"{model}: evaluation loss of the completions {row['eval_loss']:.4f} nats per token, perplexity "
        f"{row['eval_ppl']:.2f} ({row['status']}), {beginning}; {out}",
        highlight=False,
        soft_wrap=True,
    )
