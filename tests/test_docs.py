"""README, CHANGELOG and docs: links lead somewhere, names import, commands and options exist, code parses."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from normfree.cli import app
from normfree.runner import installed_studies, preset_names

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
PLUG_INS = {"private-cost"}
ENTRY_POINT_GROUPS = {"normfree.commands", "normfree.studies"}
MOST_WORDS = 25_000

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?<![\w/.-])normfree ([a-z][a-z-]+)([^`#\n]*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

of_each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("CONTRIBUTING.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in _LINK.findall(_without_code(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith("http"):
            continue
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            lost.append(link)
    assert lost == []


@of_each_page
def test_rows_of_a_table_have_as_many_cells(page: Path) -> None:
    torn = []
    for table in re.findall(r"^\|.*\n\|[-:| ]+\n(?:\|.*\n?)+", _without_code(page), re.MULTILINE):
        head, *rows = [re.sub(r"\\\|", "", line).strip() for line in table.splitlines()]
        torn += [row for row in rows if row.count("|") != head.count("|")]
    assert torn == []


@of_each_page
def test_names_can_be_imported(page: Path) -> None:
    names = set(re.findall(r"(?<![\w/.-])normfree(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))
    # NAME is for the reader to fill in; tests/test_commands_as_functions.py does.
    names = {name for name in names - ENTRY_POINT_GROUPS if "NAME" not in name}
    assert [name for name in sorted(names) if not _exists(name)] == []


@of_each_page
def test_commands_and_options_exist(page: Path) -> None:
    unknown = []
    for name, words in _commands(page):
        command = _command(name, words)
        if command is None:
            unknown.append(name)
            continue
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
        unknown += [f"{name} {option}" for option in _OPTION.findall(words) if option not in options]
    assert unknown == []


@of_each_page
def test_studies_and_presets_exist(page: Path) -> None:
    studies, presets = set(installed_studies()), set(preset_names())
    unknown = []
    for name, words in _commands(page):
        first = next(iter(words.split()), "")
        if name == "study" and re.fullmatch(r"[a-z][a-z0-9-]*", first) and first not in studies:
            unknown.append(first)
        unknown += [each for each in re.findall(r"--preset ([a-z][a-z0-9-]*)(?![\w./])", words) if each not in presets]
    assert unknown == []


@of_each_page
def test_python_parses_and_imports_normfree(page: Path) -> None:
    for language, code in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "normfree":
                assert all(_exists(f"{node.module}.{alias.name}") for alias in node.names), node.module


def test_every_figure_is_shown() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in _LINK.findall(page.read_text("utf-8"))}
    assert [path.name for path in (ROOT / "docs" / "images").iterdir() if path.resolve() not in shown] == []


def test_pages_stay_short() -> None:
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in (ROOT / "README.md", *DOCS)}
    assert words["README.md"] <= 1_500
    assert sum(words.values()) <= MOST_WORDS, words


def _without_code(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each).lower() for each in _HEADING.findall(_without_code(page)))
    return {re.sub(r"[^\w\- ]", "", each.strip()).replace(" ", "-") for each in headings}


def _exists(name: str) -> bool:
    """True if a dotted name is a module or in one, or if the module only lacks an optional library."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and not error.name.startswith("normfree"):
                return True
            continue
        for attribute in parts[n:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def _commands(page: Path) -> Iterator[tuple[str, str]]:
    """Name and further words of each ``normfree COMMAND`` in code, whole lines and quoted in a sentence."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    shell = [code for language, code in _FENCE.findall(text) if language in {"sh", "bash", ""}]
    quoted = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    for line in [*(line for code in shell for line in code.splitlines()), *quoted]:
        for name, words in _COMMAND.findall(line):
            if name not in PLUG_INS:
                yield name, words


@cache
def _group() -> TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _command(name: str, words: str) -> TyperCommand | TyperGroup | None:
    command = _group().commands.get(name)
    first = next(iter(words.split()), "")
    if isinstance(command, TyperGroup) and first in command.commands:
        command = command.commands[first]
    assert command is None or isinstance(command, TyperCommand | TyperGroup)
    return command
