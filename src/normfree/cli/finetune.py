"""``normfree finetune``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from normfree.cli.console import open_console, print_json, say, say_origin
from normfree.cli.options import Json, Model, RunFolder, checked_corpus
from normfree.cli.shared_options import trains_a_model


@trains_a_model
def finetune(
    model: Model,
    corpus: Annotated[
        str,
        typer.Option(
            help="pairs:FILE.jsonl, with a prompt and a completion a line; or as for a study.", callback=checked_corpus
        ),
    ],
    out: RunFolder,
    epochs: Annotated[
        float, typer.Option(min=0.01, help="Passes over the training split, without --tokens, --steps.")
    ] = 3.0,
    json_: Json = False,
    **training: Any,
) -> None:
    """Fine-tune a trained model on prompts and completions; only the completions are predicted.

    A stopped run resumes from its last checkpoint when the same command is given again.

    Example: normfree finetune studies/curse-of-depth-cpu/runs/pre-ln/seed-0 --corpus pairs:pairs.jsonl --out runs/tuned
    """
    from normfree.training.single_run import finetune as finetune_model

    training["changes"]["data.corpus"] = corpus
    console = open_console(json_)
    tuned = finetune_model(model, out, epochs=epochs, **training)
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
