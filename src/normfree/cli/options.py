"""What several commands have in common: options, and the console."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from normfree.errors import InputError
from normfree.files import DEFAULT_CACHE_DIR as DEFAULT_CACHE_DIR
from normfree.files import check_output_folder, exists, local_or_hub, user_path, written_whole
from normfree.processes import check_alone, is_main_process

FINISHED = ("results.csv", "removal.csv")
"""Files of a folder whose work is done: it is read, and may be read-only."""


def checked_folder(folder: Path | None) -> Path | None:
    """An output folder, after a look at whether it can be written: before any long work, in the main process only.

    Raises:
        InputError: it cannot.
    """
    if folder is not None and is_main_process() and not _is_finished(folder):
        check_output_folder(folder)
    return folder


def checked_file(file: Path | None) -> Path | None:
    """An output file, likewise.

    Raises:
        InputError: it is a folder, or its folder cannot be written.
    """
    if file is not None and is_main_process():
        check_output_folder(file.parent)
        if exists(file / "."):
            raise InputError(f"{file} is a folder; give the name of a file")
    return file


def _checked_cache(folder: Path) -> Path:
    if is_main_process() and folder != DEFAULT_CACHE_DIR and not exists(folder / "."):
        check_output_folder(folder)
    return folder


def _is_finished(folder: Path) -> bool:
    return any(exists(folder / name) for name in FINISHED)


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
    """The full name of a corpus, once its kind and its path are known to be right; ``-`` is standard input.

    Raises:
        InputError: the kind is unknown, a file or folder is missing, or standard input holds no text.
    """
    if name is None:
        return None
    from normfree.data.corpus_name import check_corpus_name, full_corpus_name

    if name == "-":
        name = str(_saved_input(context.params["cache_dir"]))
    name = full_corpus_name(name)
    check_corpus_name(name)
    return name


def _saved_input(cache_dir: Path) -> Path:
    """Standard input as a file named by its content, so that runs resume and are verified without it."""
    check_alone("--corpus -", "write the text into a file, and give its path to --corpus")
    content = sys.stdin.buffer.read()
    if not content.strip():
        raise InputError("--corpus -: standard input is empty; pipe text into the command")
    path = user_path(str(cache_dir)) / "stdin" / f"{hashlib.sha256(content).hexdigest()[:16]}.txt"
    if not path.exists():
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    return path.resolve()


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
    typer.Option(
        "--study",
        help="The file of your own that defines the study, if one does; its code is run.",
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A Hub id, a model folder, a .gguf file, or a run or checkpoint folder of Normfree.",
        callback=checked_source("model"),
    ),
]
Compared = Annotated[
    list[str],
    typer.Argument(
        help="Hub ids, model folders, .gguf files or runs of Normfree; compared on one page.",
        callback=checked_source("model"),
    ),
]
ComparedCorpus = Annotated[
    str | None,
    typer.Option(help="As for a study; default: the first run's own sequences.", callback=checked_corpus),
]
ComparedTokenizer = Annotated[
    str | None,
    typer.Option(
        help="A tokenizer's name or folder; default: the first model's.", callback=checked_source("tokenizer")
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="A tokenizer's name or folder; default: the model's.", callback=checked_source("tokenizer")),
]
ComparedLength = Annotated[int | None, typer.Option(help="T; default: the first model's.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin sequences with the beginning-of-text token, or do not; default: as the model's tokenizer does.",
    ),
]
NUMBERED = re.compile(r"(seed|checkpoint)-\d+")
"""Folders whose name says nothing without that of the folder around them."""
LONGEST_NAME = 150
"""Bytes of a default folder's name; most file systems allow 255."""
LOG_WIDTH = 110


def open_console(json_: bool) -> Console:
    """Progress and tables; beside JSON they go to standard error. A log file is as wide as the tables.

    Of several processes that train one run, the main one speaks.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings would break up the progress bars
    is_main = is_main_process()
    console = Console(stderr=json_, quiet=not is_main, force_terminal=None if is_main else False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def model_name(source: str, among: list[str]) -> str:
    """The last part of a path, or as many as tell it from the others; a Hub id as it is.

    A run is named with its configuration, a checkpoint with its run.
    """
    if not Path(source).exists():
        return source
    parts = Path(source).resolve().parts
    others = [Path(each).resolve().parts for each in among if each != source]
    n = next(n for n in range(1, len(parts) + 1) if all(each[-n:] != parts[-n:] for each in others) or n == len(parts))
    while n < len(parts) - 1 and NUMBERED.fullmatch(parts[-n]):
        n += 1
    return "/".join(parts[-n:])


def quantized(models: Mapping[str, str]) -> dict[str, str]:
    """How the weights of models, from name to source, were quantized; without those that were not."""
    from normfree.training import quantization_of

    found = {name: quantization_of(source) for name, source in models.items()}
    return {name: how for name, how in found.items() if how is not None}


def say_quantized(console: Console, weights: Mapping[str, str]) -> None:
    """A line for each model whose weights were quantized."""
    for name, how in weights.items():
        console.print(f"Weights of {name}: {how}", highlight=False, soft_wrap=True)


def output_folder(out: Path | None, command: str, models: list[str]) -> Path:
    """Where ``command`` writes what it found of ``models``: ``out``, or a folder of their own that can be written.

    That is ``command/MODEL``: the path of a model from the current folder, its parts joined by ``--``; of one elsewhere
    its last two parts and a digest of all; and a Hub id likewise. Several models have that of the first and a digest.

    Raises:
        InputError: it cannot be written.
    """
    if out is not None:
        return out
    name = _folder_name(models[0])
    if len(models) > 1:
        paths = [str(Path(each).resolve()) if exists(Path(each)) else each for each in models]
        name = f"{name}--and-{len(models) - 1}-more-{_digest(chr(10).join(paths))}"
    folder = Path(command) / name
    checked_folder(folder)
    return folder


def _folder_name(model: str) -> str:
    path = Path(model)
    if not exists(path):
        parts = [part for part in model.split("/") if part]
        whole = "--" not in model
    else:
        path = path.resolve()
        whole = path.is_relative_to(Path.cwd()) and path != Path.cwd()
        parts = list(path.relative_to(Path.cwd()).parts if whole else path.parts[-2:])
        whole = whole and not any("--" in part for part in parts)
        model = str(path)
    name = "--".join(part.strip("/") for part in parts)
    if whole and len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[-LONGEST_NAME:].decode(errors='ignore')}-{_digest(model)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def changes(
    assignments: list[str] | None,
    *,
    tokens: int | None,
    steps: int | None,
    corpus: str | None,
    tokenizer: str | None,
    bos: bool | None = None,
) -> dict[str, Any]:
    """What the options and ``--set`` change, by dotted name; an option goes before a ``--set`` of the same name.

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
    }
    if bos is not None:
        options["data.beginning"] = "bos_token" if bos else "none"
    given = {option: value for option, value in options.items() if value is not None}
    changed = dict(_assignment("--set", text, "model.n_layer=4") for text in assignments or []) | given
    _check_sources(changed)
    return changed


def _check_sources(changed: Mapping[str, Any]) -> None:
    """Checks a corpus and a tokenizer named with ``--set`` as those named with their options.

    Raises:
        InputError: one is a path, and nothing is there.
    """
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


def numbers(option: str, text: str, example: str) -> list[int]:
    """The whole numbers of a comma-separated list.

    Raises:
        InputError: it is none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not a comma-separated list of numbers, e.g. {example}") from error


def _assignment(option: str, text: str, example: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"{option} {text!r} is not of the form NAME=VALUE, e.g. {option} {example}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{option} {name}: {value!r} is not a YAML value") from error
