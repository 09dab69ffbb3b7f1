"""What commands print: tables and lines on a console, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from normfree.cli.verbose import set_others
from normfree.processes import is_main_process
from normfree.progress import show_on

if TYPE_CHECKING:
    import pandas as pd

LOG_WIDTH = 110
NARROWEST_NAME = 12
"""Where names have less room, all columns share what there is."""


def open_console(json_: bool) -> Console:
    """The console for progress and tables: standard output, or standard error next to JSON.

    A log file is as wide as the tables. Of several processes that train one run, the main one prints.
    """
    set_others()
    is_main = is_main_process()
    console = Console(stderr=json_, quiet=not is_main, force_terminal=None if is_main else False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    show_on(console)
    return console


def print_json(**content: Any) -> None:
    """One JSON object on standard output, by the main process."""
    if is_main_process():
        print(json.dumps(content))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame for JSON; NaN becomes null."""
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=9))
    return rows


def say(console: Console, text: str) -> None:
    """A line as it is: not highlighted, not wrapped, no markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def say_origin(
    console: Console, weights: Mapping[str, str | None], loaded_as: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """A line for each model whose weights were quantized, and one for each way in which models were loaded."""
    for name, how in weights.items():
        if how is not None:
            say(console, f"Weights of {name}: {how}")
    places = {name: ", ".join(each.values()) for name, each in (loaded_as or {}).items()}
    for place in dict.fromkeys(places.values()):
        named = [name for name, each in places.items() if each == place]
        say(console, f"Loaded as {place}" + ("" if len(named) == len(places) else f": {', '.join(named)}"))


class _WholeNames(Table):
    """A table whose first ``n_left`` columns are folded last, and nothing is cut."""

    n_left = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [self._widths(column) for column in self.columns]
        names, others = widths[: self.n_left], widths[self.n_left :]
        room = options.max_width - 2 * len(widths) - 1 - sum(narrowest for narrowest, _ in others)
        shares = [min(widest, room // self.n_left) for _, widest in names]
        if all(share >= min(widest, NARROWEST_NAME) for share, (_, widest) in zip(shares, names, strict=True)):
            room -= sum(shares)
            for column, share in zip(self.columns, shares, strict=False):
                column.width = share
            # What is left goes to the columns that need least not to be folded.
            for column, (narrowest, widest) in sorted(
                zip(self.columns[self.n_left :], others, strict=True), key=lambda each: each[1][1] - each[1][0]
            ):
                column.width = min(widest, narrowest + max(0, room))
                room -= column.width - narrowest
        yield from super().__rich_console__(console, options)

    @staticmethod
    def _widths(column: Column) -> tuple[int, int]:
        """Of the longest word and of the longest line of a column."""
        texts = [str(column.header), *map(str, column.cells)]
        return max(cell_len(word) for text in texts for word in text.split() or [""]), max(map(cell_len, texts))


def table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], *, n_left: int = 0, title: str = "", caption: str = ""
) -> Table:
    """A table of text; the first ``n_left`` columns, names, to the left, numbers to the right.

    Where it is too wide, headings and numbers are folded before names are; nothing is cut.
    """
    shown = _WholeNames(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    shown.n_left = n_left
    for i, column in enumerate(columns):
        shown.add_column(Text(column), justify="left" if i < n_left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown
