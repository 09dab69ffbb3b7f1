"""A page as one HTML file: no script, no network, no other file; it opens from disk."""

import base64
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import chain
from math import isnan
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from pandas.api.types import is_string_dtype

from normfree.errors import InputError, unknown_name
from normfree.files import written_whole
from normfree.report.numbers import number

_DASH = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text."""

    tag: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True, slots=True)
class Link:
    """A source, such as a paper: how it is cited, and its address.

    Raises:
        InputError: the address does not begin with ``https://``.
    """

    text: str
    url: str

    def __post_init__(self) -> None:
        if not self.url.startswith("https://"):
            raise InputError(f"the address of {self.text!r} is {self.url!r}; it has to begin with https://")


@dataclass(frozen=True, slots=True)
class Head:
    """A cell of a table's head: over ``width`` columns, and both rows of the head if ``is_whole``."""

    name: str
    width: int = 1
    is_whole: bool = False
    is_quantity: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """A data frame; its first column names the rows. Missing text is a dash, a missing number NaN.

    ``formats`` gives a format specification per column, such as ``{"eval_ppl": ".2f"}``; numbers without one
    have four significant digits. ``notes`` are printed below the table. ``groups`` gives neighbouring columns a
    common head.

    Raises:
        InputError: ``formats`` or ``groups`` name a column the frame lacks, or a group's columns are no neighbours.
    """

    tag: ClassVar[str] = "table"
    frame: pd.DataFrame
    caption: str
    formats: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [str(name) for name in self.frame.columns]
        for what, asked in (("format", self.formats), ("group", chain(*self.groups.values()))):
            for name in asked:
                if name not in names:
                    raise unknown_name(f"column to {what}", name, names)
        for head, members in self.groups.items():
            first = names.index(members[0])
            if names[first : first + len(members)] != list(members):
                raise InputError(f"the columns of the group {head!r} are no neighbours; order the frame's columns")

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Name of each column and whether it holds quantities, which are set flush right."""
        return [
            (str(name), i > 0 and all(_is_quantity(value) for value in self.frame.iloc[:, i]))
            for i, name in enumerate(self.frame.columns)
        ]

    @property
    def heads(self) -> list[list[Head]]:
        """The rows of the head: one, or two where columns are grouped."""
        group_of = {name: head for head, members in self.groups.items() for name in members}
        above: list[Head] = []
        for name, is_quantity in self.columns:
            head = group_of.get(name)
            if head is None:
                above.append(Head(name, is_whole=True, is_quantity=is_quantity))
            elif name == self.groups[head][0]:
                above.append(Head(head, len(self.groups[head])))
        below = [Head(name, is_quantity=is_quantity) for name, is_quantity in self.columns if name in group_of]
        return [above, below] if below else [above]

    @property
    def rows(self) -> list[list[str]]:
        """The cells as text."""
        columns = []
        for i, name in enumerate(self.frame.columns):
            column = self.frame.iloc[:, i]
            missing = _DASH if is_string_dtype(column) else "NaN"
            columns.append([_cell(value, self.formats.get(str(name)), missing) for value in column.tolist()])
        return [list(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True, slots=True)
class FigureElement:
    """A figure: the bytes of a PNG file, what it shows for those who can't see it, and a caption."""

    tag: ClassVar[str] = "figure"
    png_bytes: bytes
    alt: str
    caption: str

    @property
    def data_uri(self) -> str:
        """The image as a ``data:`` address.

        Raises:
            InputError: the bytes are not a PNG file.
        """
        if not self.png_bytes.startswith(b"\x89PNG\r\n\x1a\n"):
            raise InputError(f"the figure {self.caption!r} is not a PNG image; save it with save_figure")
        return "data:image/png;base64," + base64.b64encode(self.png_bytes).decode("ascii")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG header; the page keeps its layout while it loads."""
        return int.from_bytes(self.png_bytes[16:20], "big"), int.from_bytes(self.png_bytes[20:24], "big")


@dataclass(frozen=True, slots=True)
class Code:
    """Text in which every character counts, such as a command or a configuration."""

    tag: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Short facts by name."""

    tag: ClassVar[str] = "key_values"
    items: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Callout:
    """A remark set apart: a ``note``, a ``result``, or a ``warning`` about how far to trust the numbers."""

    tag: ClassVar[str] = "callout"
    text: str
    kind: Literal["note", "result", "warning"] = "note"


Element = Paragraph | Table | FigureElement | Code | KeyValues | Callout


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the report, listed in its contents."""

    title: str
    elements: Sequence[Element]


def weights_entry(
    quantized: Mapping[str, str], loaded_as: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str]:
    """Entries of a page's ``meta``: how weights were quantized, by model, and device and dtype; none for neither."""
    entries = {"Weights": "; ".join(f"{name}: {how}" for name, how in quantized.items())} if quantized else {}
    places = {name: ", ".join(each.values()) for name, each in (loaded_as or {}).items()}
    if len(set(places.values())) == 1:
        entries["Device and dtype"] = next(iter(places.values()))
    elif places:
        entries["Device and dtype"] = "; ".join(f"{name}: {place}" for name, place in places.items())
    return entries


def render_report(
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    meta: Mapping[str, str],
    byline: str = "",
    sources: Sequence[Link] = (),
    caution: str = "",
) -> str:
    """The whole report as HTML.

    All text is escaped, so a name that looks like HTML is shown as it is written.

    Args:
        title: the heading of the page.
        lead: what was found, in two or three sentences.
        sections: the parts of the report, in order.
        meta: facts about the report as a whole (version, command), shown at its end.
        byline: when and in how long it was made, below the title.
        sources: the papers it is about, linked below the title.
        caution: why its numbers prove nothing, before everything else.

    Raises:
        InputError: a figure is not a PNG image.
    """
    environment = Environment(
        loader=PackageLoader("normfree.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    anchors = _anchors([section.title for section in sections])
    return environment.get_template("template.html.j2").render(
        title=title,
        lead=lead,
        sections=list(zip(anchors, sections, strict=True)),
        meta=meta,
        byline=byline,
        sources=sources,
        caution=caution,
    )


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    meta: Mapping[str, str],
    facts: Sequence[str] = (),
    sources: Sequence[Link] = (),
    caution: str = "",
) -> Path:
    """Writes :func:`render_report` to ``path``, with the version that made the page.

    The byline is the date and ``facts``, such as how long the runs took.

    Raises:
        InputError: a figure is not a PNG image.
    """
    today = date.today()
    html = render_report(
        title=title,
        lead=lead,
        sections=sections,
        meta={"Made by": f"normfree {version('normfree')}", **meta},
        byline=" · ".join([f"{today.day} {today:%B %Y}", *facts]),
        sources=sources,
        caution=caution,
    )
    return write_report(path, html)


def write_report(path: Path, html: str) -> Path:
    """Writes ``html`` to ``path`` (UTF-8), whole or not at all; creates the folder."""
    with written_whole(path) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return path


def _anchors(titles: Sequence[str]) -> list[str]:
    """A distinct ``id`` for each title, of ASCII letters, digits and hyphens."""
    anchors: list[str] = []
    for title in titles:
        ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
        stem = re.sub(r"[^a-z0-9]+", "-", ascii_title).strip("-") or "section"
        anchor, n = stem, 1
        while anchor in anchors:
            n += 1
            anchor = f"{stem}-{n}"
        anchors.append(anchor)
    return anchors


def _is_quantity(value: Any) -> bool:
    """Numbers, and texts made of them: ``+18.9 ± 1.2 †``, ``NaN``, ``3 (1 diverged)``, a dash."""
    if isinstance(value, str):
        return bool(re.match(r"[+\N{MINUS SIGN}-]?\d|NaN\b|\N{EN DASH}$", value))
    return value is None or isinstance(value, (int, float, np.number))


def _cell(value: Any, form: str | None, missing: str) -> str:
    if value is None or value is pd.NA:
        return _DASH
    if isinstance(value, float) and isnan(value):
        return missing
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return number(float(value), form or ".4g")
    if isinstance(value, (int, np.integer)):
        return number(int(value), form or "")
    return format(value, form or "")
