"""Options that several commands share, and how their values are checked and parsed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from normfree.errors import InputError
from normfree.files import ANOTHER_CACHE, check_output_folder, exists
from normfree.files import DEFAULT_CACHE_DIR as DEFAULT_CACHE_DIR
from normfree.processes import is_main_process
from normfree.sources import local_or_hub, with_revision

FINISHED = ("results.csv", "removal.csv")
"""Files of a folder whose work is done: it is read, and may be read-only."""


def checked_folder(folder: Path | None) -> Path | None:
    """Checks that an output folder can be written, before any long work and in the main process only.

    Raises:
        InputError: it cannot.
    """
    if folder is not None and is_main_process() and not any(exists(folder / name) for name in FINISHED):
        check_output_folder(folder)
    return folder


def checked_file(file: Path | None) -> Path | None:
    """Checks an output file in the same way.

    Raises:
        InputError: it is a folder, or its folder cannot be written.
    """
    if file is not None and is_main_process():
        check_output_folder(file.parent)
        if exists(file) and file.is_dir():
            raise InputError(f"{file} is a folder; give the name of a file")
    return file


def _checked_cache(folder: Path) -> Path:
    if is_main_process() and folder != DEFAULT_CACHE_DIR and not (exists(folder) and folder.is_dir()):
        check_output_folder(folder, ANOTHER_CACHE)
    return folder


def checked_source(what: str) -> Callable[[Any], Any]:
    """A callback for names of models or tokenizers: a missing path is an error before any work.

    Args:
        what: what the names are of, for messages: "model".

    Raises (the callback):
        InputError: a name can only be a path, and nothing is there.
    """

    def check(value: str | list[str] | None) -> str | list[str] | None:
        if value is None:
            return None
        return local_or_hub(value, what) if isinstance(value, str) else [local_or_hub(each, what) for each in value]

    return check


def checked_corpus(context: typer.Context, name: str | None) -> str | None:
    """The full name of a corpus; ``-`` is standard input.

    Raises:
        InputError: the kind is unknown, a file or folder is missing, or standard input holds no text.
    """
    if name is None:
        return None
    from normfree.data.corpus_name import resolve_corpus

    return resolve_corpus(name, context.params["cache_dir"])


_MODEL, _TOKENIZER = checked_source("model"), checked_source("tokenizer")

Model = Annotated[
    str,
    typer.Argument(
        help="A Hub id, a model folder, a .gguf file, or a run or checkpoint folder of Normfree.", callback=_MODEL
    ),
]
Compared = Annotated[
    list[str],
    typer.Argument(
        help="Hub ids, model folders, .gguf files or runs of Normfree; compared on one page.", callback=_MODEL
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA where there is a device.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of weights and computation: fp32, bf16 or fp16; default: as the model was saved.")
]
Precision = Annotated[
    str | None,
    typer.Option("--dtype", help="Of the computation: fp32, bf16 or fp16 (recipe.precision); weights are fp32."),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model on the Hub; for one of several: MODEL@REVISION.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="A tokenizer's name or folder; default: the (first) model's.", callback=_TOKENIZER)
]
Output = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; default: one named after command and model.", callback=checked_folder),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin sequences with the beginning-of-text token, or do not; default: as the model's tokenizer does.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of the order of the data and of dropout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change any value, e.g. --set recipe.learning_rate=3e-5. Can be repeated."),
]
RunFolder = Annotated[Path, typer.Option(help="Run folder.", callback=checked_folder)]
CacheDir = Annotated[
    Path,
    typer.Option(
        help="Where tokenized corpora are kept and found again.",
        callback=_checked_cache,
        is_eager=True,  # --corpus - is saved there, wherever the two are in the command
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to standard output.")]

StudyFile = Annotated[
    str | None,
    typer.Option("--study", help="The file of your own that defines the study, if one does; its code is run."),
]


def changes(
    assignments: list[str] | None,
    *,
    tokens: int | None,
    steps: int | None,
    corpus: str | None,
    tokenizer: str | None,
    bos: bool | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """What the options and ``--set`` change, by dotted name; an option overrides a ``--set`` of the same name.

    Raises:
        InputError: both kinds of budget are given, a ``--set`` is not of the form NAME=VALUE, or a corpus or
            tokenizer is a path and nothing is there.
    """
    if tokens is not None and steps is not None:
        raise InputError("give --tokens or --steps, not both")
    options: dict[str, Any] = {
        "recipe.tokens": tokens,
        "recipe.steps": steps,
        "data.corpus": corpus,
        "data.tokenizer": tokenizer,
        "recipe.precision": dtype,
        "data.beginning": None if bos is None else "bos_token" if bos else "none",
    }
    given = {option: value for option, value in options.items() if value is not None}
    changed = dict(_assignment("--set", text, "model.n_layer=4") for text in assignments or []) | given
    _check_sources(changed)
    return changed


def _check_sources(changed: Mapping[str, Any]) -> None:
    """Checks a corpus and a tokenizer named with ``--set`` as those named with their options."""
    from normfree.data.corpus_name import check_corpus_name, full_corpus_name

    corpus, tokenizer = changed.get("data.corpus"), changed.get("data.tokenizer")
    if isinstance(corpus, str):
        check_corpus_name(full_corpus_name(corpus))
    if isinstance(tokenizer, str):
        local_or_hub(tokenizer, "tokenizer")


def nested_assignments(option: str, texts: list[str] | None) -> dict[str, Any]:
    """What a repeatable ``option`` sets; ``section.name=value`` is a value in a section.

    Raises:
        InputError: one is not of the form NAME=VALUE.
    """
    content: dict[str, Any] = {}
    for name, value in (_assignment(option, text, "cpus=4") for text in texts or []):
        section, dot, rest = name.partition(".")
        if dot:
            there = content.setdefault(section, {})
            content[section] = {**(there if isinstance(there, dict) else {}), rest: value}
        else:
            content[name] = value
    return content


def at_revision(models: list[str], revision: str | None) -> list[str]:
    """``MODEL@REVISION`` of each model.

    Raises:
        InputError: see :func:`normfree.sources.with_revision`.
    """
    return [with_revision(model, revision) for model in models]


def command_line() -> str:
    """The command that is at work, with all its options, for a shell."""
    return shlex.join(["normfree", *sys.argv[1:]])


def numbers(option: str, text: str, example: str) -> list[int]:
    """The whole numbers of a comma-separated list.

    Raises:
        InputError: it is none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not a comma-separated list of numbers, e.g. {example}") from error


def count_or_share(option: str, text: str | None) -> int | float | None:
    """A count such as ``256`` or a share such as ``0.08``.

    Raises:
        InputError: it is neither.
    """
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give a count such as 256 or a share such as 0.08") from error


def _assignment(option: str, text: str, example: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"{option} {text!r} is not of the form NAME=VALUE, e.g. {option} {example}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{option} {name}: {value!r} is not a YAML value") from error
