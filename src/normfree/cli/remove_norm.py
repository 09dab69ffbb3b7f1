"""``normfree remove-norm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from normfree.cli.console import open_console, print_json, records, say, say_origin, table
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import Json, Model, Output, Tokenizer, checked_corpus
from normfree.cli.shared_options import Corpus, trains_a_model
from normfree.columns import EVAL_LOSS, EVAL_PPL
from normfree.errors import InputError
from normfree.processes import check_alone

if TYPE_CHECKING:
    from normfree.removal.from_pretrained import PretrainedRemoval

Schedule = Annotated[
    str | None,
    typer.Option(
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (published, with their recipe) or a YAML file; "
        "default: by depth and budget."
    ),
]
Order = Annotated[
    Literal["auto", "published"] | None,
    typer.Option(
        help="Remove norms by measured cost, the costliest first, or as the schedule says; default: as it says."
    ),
]
QKNorms = Annotated[
    Literal["keep", "remove"] | None,
    typer.Option(
        help="Norms of queries and keys: keep them (only norms of the residual stream go), or remove them too; "
        "default: as the schedule says, or keep."
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME", help="Also push the exports and their model cards to this repository of the Hub."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Begin although it takes more than a day on this machine.")]


EvalCorpus = Annotated[
    list[str] | None,
    typer.Option(
        help="Also compare predictions on this corpus; can be repeated.",
        callback=lambda context, names: [checked_corpus(context, name) for name in names or []],
    ),
]


@trains_a_model
def remove_norm(
    model: Model,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    out: Output = None,
    schedule: Schedule = None,
    order: Order = None,
    qk_norms: QKNorms = None,
    vanilla: Annotated[bool, typer.Option(help="Also fine-tune with the norms kept, as a control.")] = True,
    eval_corpus: EvalCorpus = None,
    eval_sequences: Annotated[int, typer.Option(min=1, help="Sequences of each corpus to compare on.")] = 128,
    yes: Yes = False,
    push_to_hub: Push = None,
    private: Annotated[bool, typer.Option("--private", help="The repository is private.")] = False,
    json_: Json = False,
    **training: Any,
) -> None:
    """Take every LayerNorm or RMSNorm out of a trained model by fine-tuning, and export it without any.

    A stopped removal resumes when the same command is given again.

    Example: normfree remove-norm studies/relu-revival-cpu/runs/sm-ln-g/seed-0
    """
    from normfree.removal import publish
    from normfree.removal.from_pretrained import remove_from_pretrained

    check_alone("normfree remove-norm", "leave the launcher out: its statistics would be those of one of them")
    if push_to_hub is not None:
        publish.check_repository(push_to_hub, private=private)
    elif private:
        raise InputError("--private is for a repository of the Hub; name it with --push-to-hub, or leave it out")
    folder, name = output_folder(out, "removal", [model]), model_name(model, [model])
    data = {"data.corpus": corpus, "data.tokenizer": tokenizer}
    training["changes"] |= {name: value for name, value in data.items() if value is not None}
    console = open_console(json_)
    removal = remove_from_pretrained(
        model,
        folder,
        schedule=schedule,
        order=order,
        qk_norms=qk_norms,
        vanilla=vanilla,
        eval_corpora=eval_corpus or [],
        eval_sequences=eval_sequences,
        yes=yes,
        **training,
    )
    if not json_:
        _show(removal, name, console)
    pushed = None if push_to_hub is None else publish.push_to_hub(folder, push_to_hub, private=private)
    if json_:
        read = {"beginning": removal.beginning.summary(), "quantization": removal.quantization}
        stock = None if removal.result.stock is None else str(removal.result.stock)
        exports = {"norm_free": str(removal.result.norm_free), "stock": stock}
        tables = {"table": records(removal.result.table), "evaluation": records(removal.evaluation.evaluation)}
        print_json(folder=str(folder), **read, **exports, pushed=pushed, **tables)
    elif pushed is not None:
        say(console, f"On the Hub: {pushed}")


def _show(removal: PretrainedRemoval, name: str, console: Console) -> None:
    result = removal.result
    form = {"finetuning_tokens": ",", EVAL_LOSS: ".4f", EVAL_PPL: ".2f", "delta_loss": "+.4f"}
    rows = (
        (row["variant"], *(format(row[column], how) for column, how in form.items()))
        for row in result.table.to_dict("records")
    )
    console.print(table(("variant", "fine-tuning tokens", "loss, nats", "perplexity", "Δ loss"), rows, n_left=1))
    columns = {"loss_nats": ".4f", "delta_loss_nats": "+.4f", "jsd_nats": ".4f", "entropy_nats": ".3f", "ece": ".4f"}
    compared = (
        (row["corpus"], row["model"], *(format(row[column], how) for column, how in columns.items()))
        for row in removal.evaluation.evaluation.to_dict("records")
    )
    names = ("corpus", "model", "loss, nats", "Δ loss", "JSD, nats", "entropy, nats", "ECE")
    console.print(table(names, compared, n_left=2))
    say(console, f"Sequences of {removal.run.data.sequence_length} tokens, {removal.beginning}")
    say_origin(console, {name: removal.quantization})
    say(console, f"Without norms: {result.norm_free}")
    if result.stock is not None:
        say(console, f"As a stock model: {result.stock}")
