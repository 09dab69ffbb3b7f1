"""Every figure at every depth: its texts keep apart and on the canvas, and it fits a page."""

import itertools
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from normfree import plot
from normfree.report.style import TWO_COLUMN, paper_style
from tests.nightly import NIGHTLY

from . import gallery

DEEP = ("headwise_entropy", "layerwise_entropy", "entropy_by_layer", "perplexity_by_split", "attribution_errors")
EVERY = list(itertools.product(gallery.FIGURES, gallery.DEPTHS))
DRAWN = (
    EVERY
    if NIGHTLY
    else [(name, n_layer) for name, n_layer in EVERY if n_layer == 2 or (n_layer == 30 and name in DEEP)]
)
"""Fewest layers are the hard case of most figures, and most layers of some; ``make nightly`` draws every depth."""
TOUCHING = 0.6
"""Points by which the boxes of two texts may overlap: they have air around their letters."""
TALLEST = 12.0
"""Inches: sixty configurations have a row each in the figure of hybrid activations."""


def drawn_texts(figure: Figure) -> tuple[list[Text], np.ndarray]:
    """What the figure writes, and its boxes [n_text, 4] in points: x0, y0, x1, y1."""
    found: list[Text] = []
    plain = Text.draw

    def draw(text, renderer, *rest, **options):
        if text.get_visible() and text.get_text().strip():
            found.append(text)
        return plain(text, renderer, *rest, **options)

    with paper_style(), patch.object(Text, "draw", draw):
        renderer = FigureCanvasAgg(figure).get_renderer()
        with renderer._draw_disabled():
            figure.draw(renderer)
        boxes = [text.get_window_extent(renderer).extents for text in found]
    return found, np.array(boxes).reshape(-1, 4) * 72 / figure.dpi


def faults(figure: Figure) -> list[str]:
    """Texts that leave the canvas, and pairs that overlap; slanted ones fill too little of their boxes to tell."""
    texts, boxes = drawn_texts(figure)
    names = [text.get_text() for text in texts]
    straight = np.array([text.get_rotation() % 90 == 0 for text in texts])
    width, height = 72 * figure.get_size_inches()
    outside = (boxes[:, :2] < -TOUCHING).any(1) | (boxes[:, 2] > width + TOUCHING) | (boxes[:, 3] > height + TOUCHING)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlap = np.triu((high - low > TOUCHING).all(2) & straight & straight[:, None], 1)
    return [f"{names[i]!r} leaves the canvas" for i in np.flatnonzero(outside)] + [
        f"{names[i]!r} overlaps {names[j]!r}" for i, j in np.argwhere(overlap)
    ]


@pytest.mark.parametrize(("name", "n_layer"), DRAWN)
def test_texts_keep_apart_and_on_the_page(name: str, n_layer: int) -> None:
    figure = gallery.FIGURES[name](n_layer)
    assert faults(figure) == []
    width, height = figure.get_size_inches()
    assert width <= TWO_COLUMN + 1e-6
    assert height <= TALLEST


def test_every_figure_of_plot_is_in_the_gallery() -> None:
    source = "".join(path.read_text() for path in Path(gallery.__file__).parent.glob("*.py"))
    assert [name for name in plot.__all__ if name != "save_figure" and f"plot.{name}(" not in source] == []


def test_faults_are_found() -> None:
    figure = Figure((2, 2))
    for x, y, text in ((0.1, 0.5, "one"), (0.12, 0.5, "two"), (0.97, 0.1, "outside"), (0.5, 0.9, "free")):
        figure.text(x, y, text)
    assert faults(figure) == ["'outside' leaves the canvas", "'one' overlaps 'two'"]
