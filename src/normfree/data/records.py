"""Files of records: JSON, JSON lines, CSV, TSV and Parquet, compressed or not; the file's name tells which."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from normfree.errors import InputError
from normfree.files import read_regular

Record = dict[str, Any] | str | bytes
"""An object, a text, or a line that is not UTF-8."""

DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
PACKED = (".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
"""Not read: archives hold several files, and the others need a library."""
DEEPEST = 200
"""Deepest nesting of brackets in a record."""
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def kind_of(path: Path) -> str:
    """The suffix in lower case, without that of a compression; "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECOMPRESS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_content(path: Path, corpus: str) -> bytes:
    """The content of a file, decompressed.

    Raises:
        InputError: it cannot be read, is not a regular file, or is packed in an unsupported way.
    """
    suffix = path.suffix.lower()
    if suffix in PACKED:
        raise InputError(f"corpus {corpus!r}: {suffix} is not read; unpack it, or give {', '.join(DECOMPRESS)}")
    try:
        content = read_regular(path)
    except OSError as error:
        raise InputError(f"corpus {corpus!r}: cannot read {str(path)!r}: {error.strerror}") from error
    try:
        return DECOMPRESS[suffix](content) if suffix in DECOMPRESS else content
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"corpus {corpus!r}: {str(path)!r} is no whole {suffix} file ({error})") from error


def read_records(path: Path, corpus: str, columns: Sequence[str], kind: str) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with its place for error messages.

    Args:
        path: the file.
        corpus: its corpus, for error messages.
        columns: names of text columns; a table has at least one of them.
        kind: a key of ``RECORDS``.

    Raises:
        InputError: the file cannot be read, is not of that kind, or is a table without such a column.
    """
    return RECORDS[kind](read_content(path, corpus), f"corpus {corpus!r}", columns)


def parse_json(text: str | bytes, where: str, advice: str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: it is not JSON, is nested too deeply, or has a number that is too long.
    """
    if _nesting(text) > DEEPEST:
        raise InputError(f"{where}: not JSON that can be read (nested more than {DEEPEST} deep); {advice}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); {advice}") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: not JSON that can be read ({error}); {advice}") from error


def _nesting(text: str | bytes) -> int:
    """Nesting depth of a JSON text: Python's parser crashes on deep ones if the stack is small."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if content.count(b"[") + content.count(b"{") <= DEEPEST:
        return DEEPEST
    depth = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(content):
        bracket = match.group()
        depth += (bracket in (b"[", b"{")) - (bracket in (b"]", b"}"))
        deepest = max(deepest, depth)
    return deepest


def _json_lines(content: bytes, where: str, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            yield place, line
        else:
            yield place, parse_json(text, place, "give one JSON object a line")


def _json(content: bytes, where: str, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    """An array of objects or texts, one object, or JSON lines."""
    text = content.removeprefix(b"\xef\xbb\xbf").strip()
    if text.startswith(b"["):
        array = parse_json(_decoded(text, where), where, "give an array of objects, or one object a line")
        yield from ((f"{where}, entry {number}", row) for number, row in enumerate(array, start=1))
        return
    try:
        only = parse_json(_decoded(text, where), where, "")
    except InputError:
        yield from _json_lines(content, where, columns)
    else:
        yield f"{where}, entry 1", only


def _table(content: bytes, where: str, columns: Sequence[str], separator: str) -> Iterator[tuple[str, Record]]:
    import pandas as pd

    text = _decoded(content.removeprefix(b"\xef\xbb\xbf"), where)
    if "\0" in text:
        raise InputError(f"{where}: a NUL byte at character {text.index(chr(0))}; it is no table of text")
    try:
        table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, na_filter=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{where}: not a table ({next(iter(str(error).splitlines()), '')})") from error
    names = [str(name) for name in table.columns]
    chosen = _chosen(names, where, columns)
    for number, row in enumerate(table[chosen].itertuples(index=False, name=None), start=1):
        yield f"{where}, row {number}", dict(zip(chosen, row, strict=True))


def _parquet(content: bytes, where: str, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content))
        chosen = _chosen(file.schema_arrow.names, where, columns)
        rows = [row for batch in file.iter_batches(columns=chosen) for row in batch.to_pylist()]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a Parquet file that can be read ({error})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{where}, row {number}", row


def _chosen(names: Sequence[str], where: str, columns: Sequence[str]) -> list[str]:
    chosen = [name for name in columns if name in names]
    if not chosen:
        wanted = " or ".join(map(repr, columns))
        raise InputError(f"{where}: no column {wanted} (found {', '.join(names)}); rename the text column")
    return chosen


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file (byte {error.start} is not UTF-8)") from error


RECORDS: dict[str, Callable[[bytes, str, Sequence[str]], Iterator[tuple[str, Record]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, separator=","),
    ".tsv": partial(_table, separator="\t"),
    ".parquet": _parquet,
}
"""Readers by :func:`kind_of`."""
