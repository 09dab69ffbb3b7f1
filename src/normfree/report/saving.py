"""Saving figures: PNG and PDF files of a folder, and the element of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from normfree.errors import InputError
from normfree.files import written_whole
from normfree.report.html import Element, FigureElement, Section
from normfree.report.style import paper_style

FIGURES_FOLDER = "figures"
"""In the folder of a study or of a command's page."""


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes ``name.png`` (200 dpi) and ``name.pdf`` (TrueType fonts) into ``folder``, creating it.

    Both have one layout. The files hold no dates, so the same data give the same bytes.

    Raises:
        InputError: ``name`` is not a plain file name without ending (letters, digits, ``_``, ``+``, ``.`` and
            ``-``).
    """
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_+.-]*", name):
        raise InputError(f"figure name {name!r} is not a plain file name; use letters, digits, '_', '+', '.' and '-'")
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    paths = []
    with paper_style(), _laid_out(figure):
        for ending, fields in metadata.items():
            path = folder / f"{name}.{ending}"
            with written_whole(path) as temporary:
                figure.savefig(temporary, format=ending, metadata=fields)
            paths.append(path)
    return paths


@contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """Runs the layout engine of ``figure`` once; inside the block, drawing leaves every place as it is."""
    engine, dpi = figure.get_layout_engine(), figure.dpi
    figure.set_dpi(matplotlib.rcParams["savefig.dpi"])
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine(None)  # "none" would leave a placeholder, for which each savefig draws twice
    try:
        yield
    finally:
        figure.set_layout_engine(engine)
        figure.set_dpi(dpi)


def saved_figure(folder: Path, name: str, figure: Figure, caption: str) -> FigureElement:
    """Saves ``figure`` with :func:`save_figure` and returns it with its ``caption`` for a page.

    The alternative text is the caption up to its first colon.

    Raises:
        InputError: see :func:`save_figure`.
    """
    png = next(path for path in save_figure(figure, folder, name) if path.suffix == ".png")
    return FigureElement(png.read_bytes(), alt=caption.split(":")[0], caption=caption)


def figure_section(title: str, folder: Path, name: str, figure: Figure, caption: str, *elements: Element) -> Section:
    """A section of a page with a :func:`saved_figure`, followed by ``elements``."""
    return Section(title, [saved_figure(folder, name, figure, caption), *elements])
