"""Sources of models and tokenizers as users name them: paths, Hub ids, and revisions of these."""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from normfree.errors import InputError
from normfree.files import exists, user_path

FILE_SUFFIXES = (
    *(".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npy", ".yaml", ".yml", ".py"),
    *(".txt", ".text", ".md", ".rst", ".html", ".xml", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"),
)
"""File endings that no Hub id has, dots in ids such as Qwen2.5-0.5B included."""
NUMBERED = re.compile(r"(seed|checkpoint)-\d+")
"""Folder names that identify a model only together with the parent folder's name."""


def local_name(path: str, n: int = 1) -> str:
    """The last ``n`` parts of a path; a run is named with its configuration, a checkpoint with its run."""
    parts = Path(path).resolve().parts
    while n < len(parts) - 1 and NUMBERED.fullmatch(parts[-n]):
        n += 1
    return "/".join(parts[-n:])


def looks_local(source: str) -> bool:
    """True for a name that can only be a path: a Hub id has at most one slash, inside, and no file's ending.

    OWNER/NAME is a path if OWNER is a folder here.
    """
    owner, slash, _ = source.partition("/")
    return (
        source.startswith(("/", "./", "../", "~"))
        or source in (".", "..")
        or source.endswith("/")
        or source.count("/") > 1
        or Path(source).suffix.lower() in FILE_SUFFIXES
        or (bool(slash) and exists(Path(owner) / "."))
    )


def split_revision(source: str) -> tuple[str, str | None]:
    """The Hub id of ``ID@REVISION``, and the revision: a branch, a tag or a commit; None without one, or for a path."""
    name, at, revision = source.rpartition("@")
    if not at or not name or exists(user_path(source)):
        return source, None
    return name, revision


def with_revision(source: str, revision: str | None) -> str:
    """``ID@REVISION``; ``source`` itself without a revision.

    Raises:
        InputError: the source is a path or has another revision already, or the revision is empty.
    """
    if revision is None:
        return source
    if not revision:
        raise InputError("the revision is empty; give a branch, a tag or a commit of the model on the Hub")
    if split_revision(source)[1] is not None:
        raise InputError(f"{source} names a revision itself; give one of the two")
    if exists(user_path(source)) or looks_local(source):
        raise InputError(f"a revision is of a model on the Hub, and {source} is a path; leave it out")
    return f"{source}@{revision}"


def local_or_hub(source: str, what: str) -> str:
    """An existing path with ``~`` expanded, or ``source`` itself if it may be a Hub id. Never queries the Hub.

    Args:
        source: a path or a Hub id, with ``@REVISION`` or without.
        what: what is looked for, for the message: "model".

    Raises:
        InputError: it looks like a path (see :func:`looks_local`), and nothing is there; or its revision is empty.
    """
    path = user_path(source)
    if exists(path):
        return str(path) if source.startswith("~") else source
    name, revision = split_revision(source)
    if looks_local(name):
        owner = name.partition("/")[0]
        is_id = name.count("/") == 1 and exists(Path(owner) / ".") and owner not in ("", ".", "..", "~")
        advice = f"give a Hub id from a folder without {owner!r} in it" if is_id else "give a Hub id (OWNER/NAME)"
        raise InputError(f"there is no file or folder {source!r} for the {what}; correct the path, or {advice}")
    if revision == "":
        raise InputError(f"{source!r} ends with @; give a branch, a tag or a commit after it")
    return source


@contextmanager
def hub_access(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the options that transformers' ``from_pretrained`` takes for ``source``.

    Without a way to the Hub, it is looked for in the cache only; the Hub's client would try again for a minute.
    """
    from huggingface_hub import constants

    name, revision = split_revision(source)
    before = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or (not exists(Path(name)) and is_offline())
        yield name, {} if revision is None else {"revision": revision}
    finally:
        constants.HF_HUB_OFFLINE = before


def commit_of(source: str) -> str | None:
    """The commit of a model of the Hub as it was loaded, from the cache; None for a path."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(source)
    if exists(Path(name)):
        return None
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


@functools.cache
def is_offline() -> bool:
    """True if ``HF_HUB_OFFLINE`` asks for it, or the Hub's name cannot be resolved; a proxy resolves it itself."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or getproxies() or os.environ.get("NO_PROXY") == "*":
        return False
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def no_source(source: str, what: str, error: Exception) -> str:
    """Why ``source`` could not be loaded, in one line: offline, files not found are not in the Hub's cache."""
    if isinstance(error, OSError) and not exists(Path(source)) and is_offline():
        return f"the Hub cannot be reached, and the {what} is not in its cache"
    return next(iter(str(error).splitlines()), type(error).__name__)
