"""Documents: which are kept, in which order, and which are held out for evaluation.

In every corpus a document is kept once (by the SHA-256 of its bytes), skipped documents are counted by reason, and a
document belongs to one split. A local corpus is ordered and split by ``SHA-256(seed, SHA-256(document))``: a shuffle
that does not depend on paths, in which a document keeps its split when others are added or removed.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from normfree.errors import InputError
from normfree.processes import is_main_process

log = logging.getLogger(__name__)

Split = Literal["train", "eval"]

TEXT_COLUMNS = ("text", "content")
"""Columns that may hold the text of a record, in order of preference."""


@dataclass
class CorpusStatistics:
    """Documents kept and documents skipped, by reason.

    documents, bytes: documents kept, and their UTF-8 bytes.
    duplicates: the same bytes as a document already kept.
    undecodable, binary, empty: not UTF-8; with a NUL byte; nothing but white space.
    too_large: more than ``max_document_bytes``.
    unreadable: files and folders that could not be read.
    """

    documents: int = 0
    bytes: int = 0
    duplicates: int = 0
    undecodable: int = 0
    binary: int = 0
    too_large: int = 0
    empty: int = 0
    unreadable: int = 0

    def __add__(self, other: "CorpusStatistics") -> "CorpusStatistics":
        names = [each.name for each in fields(self)]
        return CorpusStatistics(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def skipped(self, max_document_bytes: int) -> str | None:
        """What was skipped although it is not empty, as one line; None if nothing was."""
        reasons = {
            f"larger than {max_document_bytes} bytes (data.max_document_bytes admits them)": self.too_large,
            "not UTF-8": self.undecodable,
            "with a NUL byte": self.binary,
            "unreadable or no regular file": self.unreadable,
        }
        named = [f"{n} {reason}" for reason, n in reasons.items() if n]
        n_skipped = self.too_large + self.undecodable + self.binary + self.unreadable
        n_there = n_skipped + self.documents + self.duplicates + self.empty
        return f"{n_skipped} of {n_there} documents are skipped: {', '.join(named)}" if named else None

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, each.name)} {each.name}" for each in fields(self))


class Corpus(ABC):
    """Documents in a fixed order, in two disjoint splits.

    fingerprint: changes with the documents or their order, not with where they are stored.
    """

    fingerprint: str

    @property
    @abstractmethod
    def statistics(self) -> CorpusStatistics:
        """What was kept and skipped; for a stream, among the documents read so far."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, from the first, in the same order on every call."""


@dataclass
class Admission:
    """Decides which documents are kept, and counts the others."""

    max_document_bytes: int
    statistics: CorpusStatistics = field(default_factory=CorpusStatistics)
    digests: set[bytes] = field(default_factory=set)

    def admit(self, content: bytes, digest: bytes) -> bool:
        """True if the document, whose SHA-256 is ``digest``, is kept."""
        reason = self._reason_to_skip(content, digest)
        if reason is not None:
            setattr(self.statistics, reason, getattr(self.statistics, reason) + 1)
            return False
        self.digests.add(digest)
        self.statistics.documents += 1
        self.statistics.bytes += len(content)
        return True

    def _reason_to_skip(self, content: bytes, digest: bytes) -> str | None:
        if len(content) > self.max_document_bytes:
            return "too_large"
        if not content.strip():
            return "empty"
        if b"\0" in content:
            return "binary"
        if digest in self.digests:
            return "duplicates"
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            return "undecodable"
        return None


def report_skipped(corpus: str, statistics: CorpusStatistics, max_document_bytes: int) -> None:
    """Logs in one line what of a corpus was skipped, if anything was."""
    skipped = statistics.skipped(max_document_bytes)
    if skipped is not None and is_main_process():
        log.warning("corpus %r: %s", corpus, skipped)


def shuffle_key(seed: int, digest: bytes) -> bytes:
    """The key that documents are ordered and split by, from the SHA-256 of one."""
    return hashlib.sha256(f"{seed}:".encode() + digest).digest()


def is_held_out(key: bytes, eval_fraction: float) -> bool:
    """True if the document with that key belongs to the eval split."""
    return int.from_bytes(key[:8], "big") < eval_fraction * 2.0**64


def row_text(row: object, where: str) -> str:
    """The text of a row, "" if it is null.

    Raises:
        InputError: the row, at ``where``, has no text column.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for column in TEXT_COLUMNS:
            if column in row and isinstance(row[column], str | None):
                return row[column] or ""
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise InputError(
        f"{where}: no text under {' or '.join(map(repr, TEXT_COLUMNS))} (found {found}); rename the text column"
    )
