"""Tables of commands: nothing is cut on any terminal, and names are folded last."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from normfree.cli.console import say_origin, table

NAME = "a-model-with-a-rather-long-name-of-fifty-characters-or-more"
COLUMNS = ("model", "layers", "loss, nats", "effective depth", "variance grows", "last / first")
ROWS = [
    ["tiny", "3", "6.410", "2.70 ± 0.62", "undecided", "1.1"],
    [NAME, "12", "16.412", "2.70 ± 0.62", "linearly", "1"],
]


def printed(width: int, columns: tuple[str, ...] = COLUMNS, rows: list[list[str]] = ROWS, n_left: int = 1) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(table(columns, rows, n_left=n_left))
    return file.getvalue().splitlines()


def letters(text: str) -> list[str]:
    return sorted("".join(text.split()))


@pytest.mark.parametrize("width", [200, 120, 110, 100, 90, 80, 60, 45])
def test_nothing_is_cut(width: int) -> None:
    lines = printed(width)
    assert max(map(len, lines)) <= width
    text = "".join(line for line in lines if "─" not in line)
    assert letters(text) == letters("".join((*COLUMNS, *(cell for row in ROWS for cell in row))))


@pytest.mark.parametrize("width", [200, 130, 112])
def test_names_are_whole_while_there_is_room(width: int) -> None:
    assert any(NAME in line for line in printed(width))


@pytest.mark.parametrize("width", [110, 90])
def test_numbers_are_whole_where_names_are_folded(width: int) -> None:
    lines = printed(width)
    for number in ("6.410", "16.412", "undecided", "linearly"):
        assert any(number in line for line in lines)


def test_a_table_without_names_and_one_without_rows() -> None:
    numbers = [row[1:] for row in ROWS]
    assert any("16.412" in line for line in printed(60, COLUMNS[1:], numbers, n_left=0))
    assert len(printed(80, rows=[])) >= 3


def test_the_origin_of_models_is_a_line_a_way_of_loading() -> None:
    file = io.StringIO()
    fp32, bf16 = ({"device": "cpu", "dtype": dtype} for dtype in ("fp32", "bf16"))
    say_origin(Console(file=file), {"a": None, "b": "Q4_1"}, {"a": fp32, "b": bf16})
    say_origin(Console(file=file), {}, {"a": fp32, "b": fp32})
    assert file.getvalue().splitlines() == [
        "Weights of b: Q4_1",
        "Loaded as cpu, fp32: a",
        "Loaded as cpu, bf16: b",
        "Loaded as cpu, fp32",
    ]
