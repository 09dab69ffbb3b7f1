"""What commands print: tables and lines on a console, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normfree.processes import is_main_process
from normfree.progress import show_on

if TYPE_CHECKING:
    import pandas as pd

LOG_WIDTH = 110


def open_console(json_: bool) -> Console:
    """The console for progress and tables: standard output, or standard error next to JSON.

    A log file is as wide as the tables. Of several processes that train one run, the main one prints.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings would break up the progress bars
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


def say_quantized(console: Console, weights: Mapping[str, str | None]) -> None:
    """A line for each model whose weights were quantized."""
    for name, how in weights.items():
        if how is not None:
            say(console, f"Weights of {name}: {how}")


def table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], *, n_left: int = 0, title: str = "", caption: str = ""
) -> Table:
    """A table of text; the first ``n_left`` columns to the left, numbers to the right."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i < n_left else "right", no_wrap=i < n_left)
    for row in rows:
        shown.add_row(*row)
    return shown
