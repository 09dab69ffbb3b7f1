"""Corpora on this machine: the installed Python source, a folder, a file."""

import hashlib
import json
import os
import site
import sysconfig
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from normfree.data.configuration import DataConfig
from normfree.data.documents import (
    Admission,
    Corpus,
    CorpusStatistics,
    Split,
    is_held_out,
    row_text,
    shuffle_key,
)
from normfree.errors import InputError

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates the documents of a .txt file; one without it, or another kind of file, is one document."""


class _LocalDocument(NamedTuple):
    key: bytes
    digest: bytes
    source: Path | bytes


class LocalCorpus(Corpus):
    """Documents on this machine: files, which are read again when they are needed, or bytes held in memory.

    Raises:
        InputError: no document can be used.
    """

    def __init__(self, sources: Iterable[Path | bytes], config: DataConfig, unreadable: int = 0) -> None:
        self._name = config.corpus
        self._eval_fraction = config.eval_fraction
        admission = Admission(config.max_document_bytes, CorpusStatistics(unreadable=unreadable))
        documents = []
        for source in sources:
            content = source if isinstance(source, bytes) else _read(source, admission)
            if content is None:
                continue
            digest = hashlib.sha256(content).digest()
            if admission.admit(content, digest):
                documents.append(_LocalDocument(shuffle_key(config.seed, digest), digest, source))
        self._statistics = admission.statistics
        if not documents:
            raise InputError(
                f"corpus {self._name!r} has no document that can be used ({self._statistics}); "
                "give one with non-empty UTF-8 text files, or raise max_document_bytes"
            )
        self._documents = sorted(documents)
        self.fingerprint = hashlib.sha256(b"".join(each.digest for each in self._documents)).hexdigest()

    @property
    def statistics(self) -> CorpusStatistics:
        """What was kept and skipped in the whole corpus."""
        return self._statistics

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, in the order of their shuffled hashes.

        Raises:
            InputError: there are none, or (on iteration) a file changed since the corpus was opened.
        """
        chosen = [each for each in self._documents if is_held_out(each.key, self._eval_fraction) == (split == "eval")]
        if not chosen:
            raise InputError(
                f"corpus {self._name!r}: none of its {len(self._documents)} documents falls into the {split} "
                f"split with eval_fraction {self._eval_fraction}; use more documents, another eval_fraction "
                "or another seed (a document is never divided between the splits)"
            )
        return (self._content(each).decode("utf-8") for each in chosen)

    def _content(self, document: _LocalDocument) -> bytes:
        if isinstance(document.source, bytes):
            return document.source
        try:
            content = document.source.read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).digest() != document.digest:
            raise InputError(
                f"corpus {self._name!r}: {document.source} changed while the corpus was being read; run again"
            )
        return content


def _read(path: Path, admission: Admission) -> bytes | None:
    try:
        if path.stat().st_size > admission.max_document_bytes:
            admission.statistics.too_large += 1
            return None
        return path.read_bytes()
    except OSError:
        admission.statistics.unreadable += 1
        return None


def _files(root: Path, glob: str, *, skip: frozenset[str] = frozenset()) -> tuple[list[Path], int]:
    """Files below ``root`` that match ``glob``, and the number of folders that cannot be read.

    Hidden files and folders, and folders named in ``skip``, are left out; links to folders are not followed.
    """
    unreadable: list[OSError] = []
    pattern = tuple(glob.split("/"))
    found = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        parts = Path(folder).relative_to(root).parts
        found += [
            Path(folder, name) for name in names if not name.startswith(".") and _matches((*parts, name), pattern)
        ]
    # A broken link is kept, to be counted as unreadable; pipes and sockets are not.
    return [path for path in found if path.is_file() or path.is_symlink()], len(unreadable)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def python_roots() -> list[Path]:
    """Folders of the standard library and of the packages installed for the running interpreter."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots = dict.fromkeys(Path(path).resolve() for path in (*paths, *site.getsitepackages()))
    return [root for root in roots if root.is_dir()]


def installed_python(argument: str, config: DataConfig) -> Corpus:
    """``installed-python``: the Python files of :func:`python_roots`."""
    if argument:
        raise InputError(f"corpus {config.corpus!r}: installed-python takes no argument; write 'installed-python'")
    # A virtual environment's standard library lies beside packages of another environment.
    others = frozenset({"site-packages", "dist-packages"})
    found = [_files(root, "**/*.py", skip=others) for root in python_roots()]
    files = dict.fromkeys(path for paths, _ in found for path in paths)
    return LocalCorpus(files, config, sum(unreadable for _, unreadable in found))


def directory(argument: str, config: DataConfig) -> Corpus:
    """``directory:PATH[:GLOB]``: the files below a folder, ``**/*`` by default, hidden ones left out."""
    path, glob = argument, "**/*"
    if not Path(path).expanduser().is_dir() and ":" in argument:
        path, glob = argument.rsplit(":", maxsplit=1)
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise InputError(f"corpus {config.corpus!r}: no folder {path!r}; write directory:PATH[:GLOB]")
    files, unreadable = _files(folder, glob)
    return LocalCorpus(files, config, unreadable)


def text_file(argument: str, config: DataConfig) -> Corpus:
    """``file:PATH``: a ``.jsonl`` file with a document a line, or text (see :data:`DOCUMENT_SEPARATOR`)."""
    path = Path(argument).expanduser()
    if not argument or not path.is_file():
        raise InputError(f"corpus {config.corpus!r}: no file {argument!r}; write file:PATH")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"corpus {config.corpus!r}: cannot read {argument!r}: {error.strerror}") from error
    if path.suffix == ".jsonl":
        return LocalCorpus(_json_lines(content, config.corpus), config)
    separated = path.suffix == ".txt"
    return LocalCorpus(content.split(DOCUMENT_SEPARATOR.encode()) if separated else [content], config)


def _json_lines(content: bytes, corpus: str) -> Iterator[bytes]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"corpus {corpus!r}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield line
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg}); give one JSON object a line") from error
        else:
            yield row_text(row, where).encode("utf-8", "surrogatepass")
