"""Options that several commands declare in one place, in place of their last parameter, ``**given``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    Bos,
    CacheDir,
    Device,
    Dtype,
    Precision,
    Revision,
    Seed,
    Set,
    Tokenizer,
    at_revision,
    changes,
    checked_corpus,
)

Command = Callable[..., None]
Corpus = Annotated[
    str | None, typer.Option(help="As for a study; default: the (first) run's own data.", callback=checked_corpus)
]
Length = Annotated[int | None, typer.Option(help="T; default: the run's, or 512 or the model's positions.")]
Tokens = Annotated[int | None, typer.Option(help="Training budget in tokens.")]
Steps = Annotated[int | None, typer.Option(help="Training budget in optimizer steps.")]
Lora = Annotated[
    int | None,
    typer.Option(min=1, help="Train only low-rank changes of this rank, and the norms of a removal."),
]


def reads_sequences(n: int, use: str = "measure on") -> Callable[[Command], Command]:
    """The options by which models and sequences are read (:func:`normfree.interpret.token_sequences`).

    Args:
        n: the default of ``--sequences``.
        use: what they are for, in its help.
    """
    shared = [
        _option("sequences", Annotated[int, typer.Option(help=f"Sequences to {use}.")], n),
        _option("corpus", Corpus),
        _option("tokenizer", Tokenizer),
        _option("sequence_length", Length),
        _option("bos", Bos),
        _option("dtype", Dtype),
    ]
    return lambda command: _extended(command, shared, lambda given: {"n_sequences": given.pop("sequences"), **given})


def trains_a_model(command: Command) -> Command:
    """The options by which a model is trained further; the command gets changes, seed, lora_rank and the source's."""
    shared = [
        _option("tokens", Tokens),
        _option("steps", Steps),
        _option("seed", Seed, 0),
        _option("lora", Lora),
        _option("set_", Set),
        _option("bos", Bos),
        _option("dtype", Precision),
    ]

    def adapt(given: dict[str, Any]) -> dict[str, Any]:
        values = {name: given.pop(name) for name in ("tokens", "steps", "bos", "dtype")}
        changed = changes(given.pop("set_"), corpus=None, tokenizer=None, **values)
        return {"changes": changed, "lora_rank": given.pop("lora"), **given}

    return _extended(command, shared, adapt)


def _option(name: str, annotation: Any, default: Any = None) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _extended(command: Command, shared: list[Parameter], adapt: Callable[[dict[str, Any]], dict[str, Any]]) -> Command:
    """``command`` with ``shared`` options and those of a model's source; it gets what ``adapt`` makes of them."""
    *own, _ = signature(command, eval_str=True).parameters.values()

    @wraps(command)
    def extended(*, revision: str | None, **given: Any) -> None:
        if "models" in given:
            given["models"] = at_revision(given["models"], revision)
        else:
            (given["model"],) = at_revision([given["model"]], revision)
        command(**adapt(given))

    sources = [
        _option("device", Device),
        _option("revision", Revision),
        _option("cache_dir", CacheDir, DEFAULT_CACHE_DIR),
    ]
    options: Any = extended
    options.__signature__ = Signature(
        [*(_option(each.name, each.annotation, each.default) for each in own), *shared, *sources]
    )
    return extended
