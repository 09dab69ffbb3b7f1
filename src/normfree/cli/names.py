"""Names of models in tables, and of the folders that commands write by default."""

from __future__ import annotations

import hashlib
from pathlib import Path

from normfree.cli.options import checked_folder
from normfree.files import exists
from normfree.sources import local_name

LONGEST_NAME = 150
"""Bytes of a default folder's name; most file systems allow 255."""


def model_name(source: str, among: list[str]) -> str:
    """The last part of a path, or as many as tell it from the others; a Hub id as it is.

    See :func:`normfree.sources.local_name`.
    """
    if not Path(source).exists():
        return source
    parts = Path(source).resolve().parts
    others = [Path(each).resolve().parts for each in among if each != source]
    n = next(n for n in range(1, len(parts) + 1) if all(each[-n:] != parts[-n:] for each in others) or n == len(parts))
    return local_name(source, n)


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
