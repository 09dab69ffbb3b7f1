"""Corpora on this machine: the installed Python source, a folder, a file."""

import hashlib
import logging
import os
import site
import sysconfig
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from normfree.data.corpus_name import existing_file, split_directory
from normfree.data.data_config import DataConfig
from normfree.data.documents import (
    TEXT_COLUMNS,
    Admission,
    Corpus,
    CorpusStatistics,
    Split,
    is_held_out,
    report_skipped,
    row_text,
    shuffle_key,
)
from normfree.data.passages import PASSAGE_CHARACTERS, passages
from normfree.data.records import RECORDS, Record, kind_of, read_content, read_records
from normfree.errors import InputError
from normfree.files import read_regular
from normfree.processes import is_main_process

log = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates the documents of a .txt file; a file without it, or of another kind, is one document."""
RECORDS_NOT_PROSE = frozenset(RECORDS) - {".json"}
"""In a folder, a JSON file may as well be a configuration among source code."""
LONGEST_CHARACTER = 4
"""UTF-8 bytes of a character, at most."""


class _LocalDocument(NamedTuple):
    key: bytes
    digest: bytes
    source: Path | bytes


class LocalCorpus(Corpus):
    """Documents on this machine: files, read again when they are needed, or bytes held in memory.

    Documents over ``max_document_bytes`` are skipped: most are generated tables. If there are no others, their passages
    are the documents (see :func:`~normfree.data.passages.passages`).

    Raises:
        InputError: no document can be used.
    """

    def __init__(self, sources: Iterable[Path | bytes], config: DataConfig, unreadable: int = 0) -> None:
        self._name = config.corpus
        self._eval_fraction = config.eval_fraction
        self._seed = config.seed
        admission = Admission(config.max_document_bytes, CorpusStatistics(unreadable=unreadable))
        documents: list[_LocalDocument] = []
        large: list[Path | bytes] = []
        for source in sources:
            n_large = admission.statistics.too_large
            documents += self._admitted(source, admission)
            if admission.statistics.too_large > n_large:
                large.append(source)
        if not documents:
            documents += self._admitted_passages(large, admission)
        self._statistics = admission.statistics
        if not documents:
            raise InputError(
                f"corpus {self._name!r} has no document that can be used ({self._statistics}); "
                "give one with non-empty UTF-8 text files, or raise data.max_document_bytes"
            )
        report_skipped(self._name, self._statistics, config.max_document_bytes)
        self._documents = sorted(documents)
        self.fingerprint = hashlib.sha256(b"".join(each.digest for each in self._documents)).hexdigest()

    def _admitted(self, source: Path | bytes, admission: Admission) -> list[_LocalDocument]:
        content = source if isinstance(source, bytes) else _read(source, admission)
        if content is None:
            return []
        digest = hashlib.sha256(content).digest()
        if not admission.admit(self._text(content), digest):
            return []
        return [_LocalDocument(shuffle_key(self._seed, digest), digest, source)]

    def _admitted_passages(self, large: list[Path | bytes], admission: Admission) -> list[_LocalDocument]:
        documents = []
        for source in large:
            try:
                text = (source if isinstance(source, bytes) else read_regular(source)).decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # stays counted as too large
            if "\0" in text:
                continue
            admission.statistics.too_large -= 1
            most = max(1, min(PASSAGE_CHARACTERS, admission.max_document_bytes // LONGEST_CHARACTER))
            for passage in passages(text, most):
                documents += self._admitted(passage.encode("utf-8"), admission)
        return documents

    def _text(self, content: bytes) -> bytes:
        """The text that a document is admitted by, in UTF-8; lone surrogates are kept, and are not valid UTF-8."""
        return content

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
            content = read_regular(document.source)
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
        return read_regular(path)
    except OSError:
        admission.statistics.unreadable += 1
        return None


def _files(root: Path, glob: str, *, skip: frozenset[str] = frozenset()) -> tuple[list[Path], int]:
    """Files below ``root`` that match ``glob``, and the number of unreadable folders.

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
    # A virtual environment's standard library lies next to packages of another environment.
    others = frozenset({"site-packages", "dist-packages"})
    found = [_files(root, "**/*.py", skip=others) for root in python_roots()]
    files = dict.fromkeys(path for paths, _ in found for path in paths)
    return LocalCorpus(files, config, sum(unreadable for _, unreadable in found))


def directory(argument: str, config: DataConfig) -> Corpus:
    """``directory:PATH[:GLOB]``: the files below a folder, ``**/*`` by default, hidden ones left out.

    Each is one document, also a file of records, which the log mentions.
    """
    path, glob = split_directory(argument, config.corpus)
    files, unreadable = _files(path, glob)
    records = [file for file in files if kind_of(file) in RECORDS_NOT_PROSE]
    if records and is_main_process():
        log.warning(
            "corpus %r: %d files of records such as %s are read as plain text, each one document; file:PATH reads the "
            "records of one",
            config.corpus,
            len(records),
            records[0].name,
        )
    return LocalCorpus(files, config, unreadable)


def text_file(argument: str, config: DataConfig) -> Corpus:
    """``file:PATH``: the records of a JSON, CSV, TSV or Parquet file, each a document, or text.

    The text of a table is in the column ``text`` or ``content``. A ``.txt`` file is split at
    :data:`DOCUMENT_SEPARATOR`; any other is one document. Files may be compressed (``.gz``, ``.bz2``, ``.xz``).
    """
    path = existing_file(argument, config.corpus)
    kind = kind_of(path)
    if kind in RECORDS:
        return LocalCorpus(_texts(read_records(path, config.corpus, TEXT_COLUMNS, kind)), config)
    content = read_content(path, config.corpus)
    return LocalCorpus(content.split(DOCUMENT_SEPARATOR.encode()) if kind == ".txt" else [content], config)


def _texts(records: Iterable[tuple[str, Record]]) -> Iterator[bytes]:
    for where, record in records:
        yield record if isinstance(record, bytes) else row_text(record, where).encode("utf-8", "surrogatepass")
