"""Pages of the site that are written from the package and the repository: API, commands, gallery, contributing.

They are in docs/reference, rewritten by each build and not tracked.
"""

from __future__ import annotations

import ast
import csv
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import typer
import yaml
from typer.core import TyperCommand, TyperGroup

ROOMS = {
    "normfree": "Entropy of a model, monitors for training, studies, models without norms",
    "normfree.plot": "Figures: each takes DataFrames and returns a matplotlib Figure",
    "normfree.entropy": "Attention entropy from queries and keys",
    "normfree.probes": "Probes of running models",
    "normfree.modeling": "The decoder, its configuration and conversions",
    "normfree.removal": "Norms out of trained models",
    "normfree.spark": "Sparse layers and top-k",
    "normfree.spark.decode": "Kernels of sparse decode",
    "normfree.data": "Corpora, tokenizers and packed tokens",
    "normfree.training": "The training loop",
    "normfree.training.objectives": "Training objectives",
    "normfree.runner": "Studies",
    "normfree.runner.executors": "Where the runs of a study are trained",
}
"""Modules with public names, ``__all__``, and what they are for. A name is described in the first that has it."""
PARTS = ("normfree.modeling.conversion",)
"""Modules whose public names are those of a room."""
PAGES = ("commands", "claims", "gallery", "architecture", "contributing", "changelog")
"""Generated pages next to the API reference."""

_IMAGE = re.compile(r"^!\[([^\]]*)\]\((images/[^)]+)\)", re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


class Name(NamedTuple):
    """A public name, where it is exported, and its docstring."""

    room: str
    name: str
    value: Any
    doc: str


def public_names() -> Iterator[Name]:
    """Every name in ``__all__`` of the rooms, once."""
    seen: set[int] = set()
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if isinstance(value, ModuleType) or id(value) in seen:
                continue
            described = inspect.isclass(value) or inspect.isroutine(value)
            if described:
                seen.add(id(value))
            yield Name(room, name, value, (value.__doc__ or "") if described else _doc_of_constant(room, name))


def undocumented() -> list[str]:
    """Public names without a docstring; a constant has it as a string literal below."""
    return [f"{each.room}.{each.name}" for each in public_names() if not each.doc.strip()]


def write_pages(docs: Path) -> None:
    """Writes the generated pages into ``docs/reference``.

    Raises:
        ValueError: if a public name has no docstring.
    """
    if missing := undocumented():
        raise ValueError(f"public names without a docstring: {', '.join(missing)}")
    for name, text in pages(docs).items():
        path = docs / "reference" / name
        path.parent.mkdir(exist_ok=True)
        # An unchanged page is left alone, so that the next build is quick.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages(docs: Path) -> dict[str, str]:
    """Name and text of each generated page."""
    before, house, after = _section(_inward(docs, "CONTRIBUTING.md"), "The house")
    return {
        "index.md": _reference_index(),
        **{f"{room}.rst": _room_page(room) for room in ROOMS},
        "commands.md": "\n".join(_command_pages()),
        "claims.md": _claims(docs),
        "gallery.md": _gallery(docs),
        "architecture.md": house.replace("## The house", "# Architecture", 1),
        "contributing.md": f"{before}{after}",
        "changelog.md": _inward(docs, "CHANGELOG.md"),
    }


def _doc_of_constant(module: str, name: str) -> str:
    """The string literal below a constant's assignment, in the module that defines it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return _doc_of_constant(node.module, name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                return str(following.value.value)
            return ""
    return ""


def _reference_index() -> str:
    rows = [f"| [`{room}`]({room}.rst) | {what} |" for room, what in ROOMS.items()]
    tree = "\n".join(ROOMS)
    return "\n".join(
        [
            "# API reference\n",
            "Public names: those that a module lists in `__all__`. Other names may change without notice.\n",
            "| module | |\n|---|---|",
            *rows,
            f"\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n",
        ]
    )


def _room_page(room: str) -> str:
    lines = [room, "=" * len(room), "", f"{ROOMS[room]}.", "", f".. currentmodule:: {room}", ""]
    for each in public_names():
        if each.room != room:
            continue
        if inspect.isclass(each.value):
            lines += [f".. autoclass:: {each.name}", "   :members:", ""]
        elif inspect.isroutine(each.value):
            lines += [f".. autofunction:: {each.name}", ""]
        else:
            doc = inspect.cleandoc(each.doc).replace("\n", "\n   ")
            lines += [f".. py:data:: {each.name}", "", f"   {doc}", ""]
    described = {each.name for each in public_names() if each.room == room}
    home = {id(each.value): f"{each.room}.{each.name}" for each in public_names()}
    module = importlib.import_module(room)
    elsewhere = [home.get(id(getattr(module, name)), name) for name in sorted({*module.__all__} - described)]
    if elsewhere:
        lines += ["Also here: " + ", ".join(f":py:obj:`{name}`" for name in elsewhere) + ".", ""]
    return "\n".join(lines)


def _command_pages() -> Iterator[str]:
    from normfree.cli import app

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    yield "# Commands\n\n`normfree COMMAND --help` prints the same.\n"
    for name, command in group.commands.items():
        yield from _command(f"normfree {name}", command)


def _command(path: str, command: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=path)
    if isinstance(command, TyperGroup) and command.commands:
        yield f"## {path}\n\n{_paragraphs(command.help)}\n"
        for name, inner in command.commands.items():
            yield from _command(f"{path} {name}", inner)
        return
    assert isinstance(command, TyperCommand | TyperGroup)
    yield f"## {path}\n\n```text\n{' '.join([path, *command.collect_usage_pieces(context)])}\n```\n"
    yield f"{_paragraphs(command.help)}\n"
    records = [record for each in command.params if (record := each.get_help_record(context)) is not None]
    if records:
        yield "| option | |\n|---|---|"
        yield from (f"| `{_cell(option)}` | {_cell(what, escape=True)} |" for option, what in records)
    yield ""


def _paragraphs(text: str | None) -> str:
    paragraphs = inspect.cleandoc(text or "").replace("\b", "").split("\n\n")
    return "\n\n".join(_cell(each, escape=True) for each in paragraphs)


def _cell(text: str, *, escape: bool = False) -> str:
    """Text of one line of Markdown; code in backticks stays code, and options become code."""
    text = " ".join(text.replace(str(Path.home()), "~").split())
    if escape:
        text = re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)
    parts = text.split("`")
    if escape:
        parts[::2] = [re.sub(r"([\\*_<>\[\]$])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", r"\|")


def _claims(docs: Path) -> str:
    """Every published claim with what was measured: a table for each paper."""
    with (docs.parent / "benchmarks" / "results" / "claims.csv").open(encoding="utf-8", newline="") as file:
        claims = list(csv.DictReader(file))
    parts = [
        "# Claims",
        "Effects at CPU scale, from benchmarks/results/claims.csv. [What we found](../what-we-found.md)"
        " discusses them. ± is half of a 95 % t-interval over seeds.",
    ]
    for paper in dict.fromkeys(each["paper"] for each in claims):
        lines = ["| claim | verdict | measured | | seeds | command |", "|---|---|---|---:|---:|---|"]
        for row in claims:
            if row["paper"] == paper:
                effect = f"{row['effect']} ± {row['half_width']}" if row["half_width"] else row["effect"]
                cells = (row["claim"], row["verdict"], row["measured"], effect.replace("-", "−"), row["seeds"])
                lines.append(f"| {' | '.join(cells)} | `{row['command']}` |")
        parts += [f"## {paper}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _gallery(docs: Path) -> str:
    """Every figure of the pages, with the command that draws it and the section that discusses it."""
    drawn_by = yaml.safe_load((docs / "figures.yaml").read_text(encoding="utf-8"))
    cards, seen = [], set()
    for page in sorted(set(docs.glob("*.md")) - {docs / "index.md"}):
        text = page.read_text(encoding="utf-8")
        for image in _IMAGE.finditer(text):
            if image[2] in seen:
                continue
            seen.add(image[2])
            before = re.sub(r"```.*?```", "", text[: image.start()], flags=re.DOTALL)
            heading = _HEADING.findall(before)[-1]
            cards.append(
                f":::{{grid-item-card}} {image[1]}\n:img-top: ../{image[2]}\n:img-alt: {image[1]}\n\n"
                f"`{drawn_by[Path(image[2]).name]}`\n\n[{_plain(heading)}](../{page.name}#{_anchor(heading)})\n:::\n"
            )
    head = "# Gallery\n\nEvery figure of these pages: what draws it, and where it is discussed.\n\n"
    return head + "::::{grid} 1 1 2 2\n:gutter: 3\n\n" + "\n".join(cards) + "::::\n"


def _plain(heading: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", _plain(heading).lower().strip()).replace(" ", "-")


def _section(text: str, heading: str) -> tuple[str, str, str]:
    """What is before a section of the second level, the section, and what follows it."""
    start = text.index(f"## {heading}\n")
    end = text.find("\n## ", start) + 1
    return text[:start], text[start:end], text[end:]


def _inward(docs: Path, name: str) -> str:
    """A page of the repository's root, with links as seen from docs/reference; those out of the site become text."""
    own = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "../index.md"}

    def inside(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        if target in own:
            return f"[{words}]({own[target]}{anchor})"
        return f"[{words}](../{target.removeprefix('docs/')}{anchor})" if target.startswith("docs/") else words

    return _LINK.sub(inside, (docs.parent / name).read_text(encoding="utf-8"))
