"""Names of corpora: ``KIND``, ``KIND:ARGUMENT`` or the bare path of a file or folder."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from normfree.errors import InputError, unknown_name
from normfree.files import ANOTHER_CACHE, check_output_folder, exists, user_path, written_whole
from normfree.processes import check_alone
from normfree.sources import looks_local

KINDS = ("installed-python", "directory", "file", "codeparrot", "hf", "pairs")
"""What may precede the first colon."""


def resolve_corpus(name: str, cache_dir: Path) -> str:
    """The full name of a corpus that is there; ``-`` is standard input, saved as a file in ``cache_dir``.

    Raises:
        InputError: the kind is unknown, a file or folder is missing, or standard input holds no text.
    """
    name = full_corpus_name(str(_saved_input(cache_dir)) if name == "-" else name)
    check_corpus_name(name)
    return name


def full_corpus_name(text: str) -> str:
    """``file:PATH`` or ``directory:PATH`` for the bare path of a file or folder; any other name as it is."""
    if not text or text.partition(":")[0] in KINDS:
        return text
    path = user_path(text)
    if not exists(path):
        return text
    return f"directory:{text}" if path.is_dir() else f"file:{text}"


def check_corpus_name(name: str) -> None:
    """Checks the kind of a corpus and, for a local one, that its file or folder is there. Nothing is opened.

    Raises:
        InputError: the kind is unknown, or the file or folder is missing.
    """
    kind, _, argument = name.partition(":")
    if kind not in KINDS:
        if looks_local(name):
            raise InputError(f"corpus {name!r}: there is no such file or folder; correct the path")
        raise unknown_name("corpus", kind, [*KINDS, "a file or folder"])
    if kind == "directory":
        split_directory(argument, name)
    elif kind in ("file", "pairs"):
        existing_file(argument, name)


def existing_file(argument: str, corpus: str) -> Path:
    """The file of a ``file:`` or ``pairs:`` corpus.

    Raises:
        InputError: it is missing, or a folder.
    """
    path = user_path(argument)
    if not argument or not exists(path) or path.is_dir():
        kind = corpus.partition(":")[0]
        raise InputError(f"corpus {corpus!r}: no file {argument!r}; write {kind}:PATH")
    return path


def split_directory(argument: str, corpus: str) -> tuple[Path, str]:
    """The folder and the glob of a ``directory:PATH[:GLOB]`` corpus; ``**/*`` without one.

    Raises:
        InputError: there is no such folder.
    """
    path, glob = argument, "**/*"
    if not _is_folder(path) and ":" in argument:
        path, glob = argument.rsplit(":", maxsplit=1)
    if not path or not _is_folder(path):
        raise InputError(f"corpus {corpus!r}: no folder {path!r}; write directory:PATH[:GLOB]")
    return user_path(path), glob


def _is_folder(path: str) -> bool:
    return exists(user_path(path)) and user_path(path).is_dir()


def _saved_input(cache_dir: Path) -> Path:
    """Standard input as a file named by its content, so that runs resume and are verified without it."""
    check_alone("--corpus -", "write the text into a file, and give its path to --corpus")
    content = sys.stdin.buffer.read()
    if not content.strip():
        raise InputError("--corpus -: standard input is empty; pipe text into the command")
    path = user_path(str(cache_dir)) / "stdin" / f"{hashlib.sha256(content).hexdigest()[:16]}.txt"
    if not path.exists():
        check_output_folder(path.parent, ANOTHER_CACHE)
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    return path.resolve()
