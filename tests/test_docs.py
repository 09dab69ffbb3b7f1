"""README, CHANGELOG and docs: links lead somewhere, names import, commands and options exist, code parses."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import typer
import yaml
from typer.core import TyperCommand, TyperGroup

from normfree.cli import app
from normfree.runner import Collection, Study, installed_studies, load_preset, preset_names

ROOT = Path(__file__).parents[1]
GENERATED = ("_build", "reference")
DOCS = sorted(
    page for page in (ROOT / "docs").rglob("*.md") if page.relative_to(ROOT / "docs").parts[0] not in GENERATED
)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
PLUG_INS = {"private-cost"}
ENTRY_POINT_GROUPS = {"normfree.commands", "normfree.studies"}
MOST_WORDS = 25_000

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w*|\{[\w-]+\}[^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CARD = re.compile(r"^:link: (\S+)\n:link-type: doc$", re.MULTILINE)
_COMMAND = re.compile(r"(?<![\w/.-])normfree ([a-z][a-z-]+)([^`#\n]*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def _site() -> ModuleType:
    """docs/generate.py, which writes pages of the site."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = _site()

of_each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


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
        if language != "python" and not language.startswith("{code-cell}"):
            continue
        for node in ast.walk(ast.parse(re.sub(r"^:.*\n", "", code))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "normfree":
                assert all(_exists(f"{node.module}.{alias.name}") for alias in node.names), node.module


def test_every_figure_is_shown() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in _LINK.findall(page.read_text("utf-8"))}
    assert [path.name for path in (ROOT / "docs" / "images").iterdir() if path.resolve() not in shown] == []


def test_every_page_is_in_the_table_of_contents_of_the_site() -> None:
    listed = []
    for page in DOCS:
        for tree in _TOCTREE.findall(page.read_text(encoding="utf-8")):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed += [(page.parent / f"{name}.md").relative_to(ROOT / "docs") for name in names]
    generated = sorted(Path("reference", name) for name in SITE.pages(ROOT / "docs") if name.endswith(".md"))
    pages = {page.relative_to(ROOT / "docs") for page in DOCS} - {Path("index.md")}
    assert sorted(listed) == sorted([*pages, *generated])


def test_cards_of_the_home_page_lead_somewhere() -> None:
    cards = _CARD.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert len(cards) >= 5
    assert [name for name in cards if not (ROOT / "docs" / f"{name}.md").exists()] == []


def test_every_public_name_is_documented() -> None:
    assert SITE.undocumented() == []
    rooms = {room for room in SITE.ROOMS if room != "normfree"}
    with_names = {
        path.relative_to(ROOT / "src").with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
        for path in (ROOT / "src").rglob("*.py")
        if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert with_names - rooms - {"normfree", *SITE.PARTS} == set()


def test_links_of_generated_pages_lead_somewhere() -> None:
    generated = SITE.pages(ROOT / "docs")
    lost = []
    for name, text in generated.items():
        for link in _LINK.findall(_FENCE.sub("", text)):
            target, _, anchor = link.partition("#")
            path = Path(os.path.normpath(ROOT / "docs" / "reference" / target))
            if link.startswith("http"):
                continue
            page = generated.get(target or name) or (path.read_text(encoding="utf-8") if path.exists() else None)
            if page is None or (anchor and anchor not in _anchors_of(page)):
                lost.append(f"{name}: {link}")
    assert lost == []


def test_the_gallery_says_how_each_figure_is_drawn() -> None:
    drawn_by = yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text(encoding="utf-8"))
    assert set(drawn_by) == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    gallery = SITE.pages(ROOT / "docs")["gallery.md"]
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for figure, line in drawn_by.items():
        assert f"`{line}`" in gallery.partition(f":img-top: ../images/{figure}\n")[2].partition("\n:::")[0]
        program, name, words = (*line.split(" ", 2), "")[:3]
        if program == "make":
            assert f"\n{name}: " in targets
        elif name not in PLUG_INS:
            _check_line(name, words)


def test_every_claim_has_its_effect_and_command() -> None:
    text = (ROOT / "docs" / "what-we-found.md").read_text(encoding="utf-8")
    table = text.partition("| Published claim | Here |\n|---|---|\n")[2].partition("\n\n")[0]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    shown, paper = [], ""
    for claim, verdict in told:
        if verdict:
            named = re.match(r"\[([^\]]+)\]", verdict)
            assert named is not None, verdict
            shown.append((paper, claim, named[1]))
        else:
            paper = claim.strip("*")
    claims = pd.read_csv(ROOT / "benchmarks" / "results" / "claims.csv")
    listed = claims[["paper", "claim", "verdict"]].drop_duplicates().itertuples(index=False, name=None)
    assert sorted(shown) == sorted(listed)
    assert claims["effect"].notna().all()
    for line in claims["command"]:
        program, name, words = line.split(" ", 2)
        assert program == "normfree"
        if name not in PLUG_INS or _command(name, words) is not None:
            _check_line(name, words)


def _check_line(name: str, words: str) -> None:
    """Checks that ``normfree name words`` has a command, its options and, of a study, its name."""
    command = _command(name, words)
    assert command is not None, name
    assert {*_OPTION.findall(words)} <= {option for each in command.params for option in each.opts}, words
    assert name != "study" or words.split()[0] in installed_studies(), words


def test_the_guide_counts_the_runs_of_each_study() -> None:
    rows = re.findall(
        r"^\| (\[?`[^|]*) \|[^|]*\| (\d[\d, ]*) \|$", (ROOT / "docs/guide.md").read_text("utf-8"), re.MULTILINE
    )
    told = {
        name: int(number)
        for names, numbers in rows
        for name, number in zip(re.findall(r"`([\w-]+)`", names), numbers.split(", "), strict=False)
    }
    assert len(told) > 10
    assert told == {name: _runs_of_a_seed(installed_studies()[name]) for name in told}


def _runs_of_a_seed(study: Study | Collection) -> int:
    if isinstance(study, Study):
        return len(study.configurations(load_preset("cpu")))
    members = study.members("cpu", lambda preset: preset)
    return sum(len(each.study.configurations(each.preset)) for each in members)


def test_pages_stay_short() -> None:
    pages = (ROOT / "README.md", *DOCS)
    words = {str(page.relative_to(ROOT)): len(_without_cells(page).split()) for page in pages}
    assert words["README.md"] <= 1_500
    assert sum(words.values()) <= MOST_WORDS, words


def _without_code(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _without_cells(page: Path) -> str:
    """A page without the programs of a tutorial and the tables of contents."""
    return re.sub(r"^```\{(?:code-cell|toctree)\}.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    return _anchors_of(page.read_text(encoding="utf-8"))


def _anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    without_code = _FENCE.sub("", text)
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each).lower() for each in _HEADING.findall(without_code))
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
