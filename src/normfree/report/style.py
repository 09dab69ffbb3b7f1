"""How figures look: sizes, fonts and colours that survive a two-column paper and colour blindness."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.colors import Colormap, ListedColormap, to_rgb

# Widths of a column and of the text of a two-column conference paper, inches.
ONE_COLUMN = 3.3
TWO_COLUMN = 6.9

INK = "#1f2328"
QUIET = "#6b7280"
NAN_FACE = "#e5e7eb"
Style = dict[str, Any]
"""Keyword arguments of a matplotlib artist."""
NON_FINITE: Style = {"facecolor": NAN_FACE, "edgecolor": "#b6bcc6", "hatch": "////", "linewidth": 0}
"""A patch where a number is NaN or infinite."""
DASHED: Style = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 2))}
"""A line to compare with, such as the entropy of uniform attention."""

# Okabe and Ito's colours: blues have LayerNorm, reds and oranges have none; the lighter of each pair is ReLU.
_FIXED_COLOURS = {
    "SM+LN+G": "#0072B2",
    "SM+LN+R": "#56B4E9",
    "SM+G": "#D55E00",
    "SM+R": "#E69F00",
}
# Okabe and Ito's others, then Paul Tol's "muted" ones and a grey; the last are near to those before them.
_FREE_COLOURS = ("#009E73", "#CC79A7", "#332288", "#999933", "#882255")
_LAST_COLOURS = ("#661100", "#44AA99", "#117733", "#DDCC77", "#777777")

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so figures are the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 4.0,
    "axes.labelsize": 7.0,
    "xtick.labelsize": 6.2,
    "ytick.labelsize": 6.2,
    "legend.fontsize": 6.2,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.5,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # TrueType outlines: text stays text in the PDF
    "ps.fonttype": 42,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """The style of every figure, as a ``with`` block or decorator; restores matplotlib's settings on exit."""
    with matplotlib.rc_context(_RC):
        yield


def configuration_colours(configurations: Sequence[str]) -> dict[str, str]:
    """A colour for each configuration, as ``#rrggbb``.

    The four of ReLU's Revival always have the same colour; others take the free colours in the order given, among
    them those of the four that are not there. Fourteen configurations have fourteen colours; then they start over.
    """
    unused = [colour for name, colour in _FIXED_COLOURS.items() if name not in configurations]
    free = cycle([*_FREE_COLOURS, *unused, *_LAST_COLOURS])
    return {name: _FIXED_COLOURS.get(name) or next(free) for name in configurations}


def entropy_colours() -> Colormap:
    """The scale of the entropy heatmaps: viridis, yellow is high, as in Figure 1 of ReLU's Revival."""
    return matplotlib.colormaps["viridis"]


def depth_colours(n_layer: int) -> ListedColormap:
    """One colour a layer, light for the first and dark for the last, all visible on white."""
    plasma = matplotlib.colormaps["plasma"]
    return ListedColormap([plasma(0.88 * (1 - i / max(n_layer - 1, 1))) for i in range(n_layer)], name="depth")


def difference_colours() -> Colormap:
    """A scale for differences around zero: blue below, red above, white at zero."""
    return matplotlib.colormaps["RdBu_r"]


def readable_on(colours: Colormap, position: float) -> str:
    """Black or white, whichever has the higher contrast (WCAG relative luminance) on the cell's colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colours(float(position)))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"
