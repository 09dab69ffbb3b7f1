"""``normfree finetune``."""

from __future__ import annotations

from typing import Annotated

import typer

from normfree.cli.console import open_console, print_json, say, say_origin
from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Device,
    Json,
    Model,
    Precision,
    Revision,
    RunFolder,
    Seed,
    Set,
    at_revision,
    changes,
    checked_corpus,
)


def finetune(
    model: Model,
    corpus: Annotated[
        str,
        typer.Option(
            help="pairs:FILE.jsonl, with a prompt and a completion a line; or as for a study.", callback=checked_corpus
        ),
    ],
    out: RunFolder,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the training split.")] = 3.0,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens, in place of epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in optimizer steps, in place of epochs.")] = None,
    seed: Seed = 0,
    lora: Annotated[int | None, typer.Option(min=1, help="Train low-rank changes of this rank only.")] = None,
    set_: Set = None,
    bos: Bos = None,
    device: Device = None,
    dtype: Precision = None,
    revision: Revision = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Fine-tune a trained model on prompts and completions; only the completions are predicted.

    A stopped run resumes from its last checkpoint when the same command is given again.

    Example: normfree finetune studies/curse-of-depth-cpu/runs/pre-ln/seed-0 --corpus pairs:pairs.jsonl --out runs/tuned
    """
    from normfree.training.single_run import finetune as finetune_model

    (model,) = at_revision([model], revision)
    wanted = changes(set_, tokens=tokens, steps=steps, corpus=corpus, tokenizer=None, bos=bos, dtype=dtype)
    console = open_console(json_)
    tuned = finetune_model(
        model,
        out,
        changes=wanted,
        epochs=epochs,
        seed=seed,
        lora_rank=lora,
        device=device,
        cache_dir=cache_dir,
    )
    row = tuned.run.row
    if json_:
        read = {"beginning": tuned.beginning.summary(), "quantization": tuned.quantization}
        print_json(folder=str(out), **read, **row)
        return
    say_origin(console, {model: tuned.quantization})
    say(
        console,
        f"{model}: evaluation loss of the completions {row['eval_loss']:.4f} nats per token, perplexity "
        f"{row['eval_ppl']:.2f} ({row['status']}), {tuned.beginning}; {out}",
    )
