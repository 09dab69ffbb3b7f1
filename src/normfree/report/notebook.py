"""Figures in notebooks."""

import io
import sys

from matplotlib.figure import Figure


def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def draw_figures_in_notebooks() -> None:
    """Has IPython draw a ``Figure`` that a cell returns; without IPython, or where it does already, nothing happens.

    IPython learns to draw figures only by ``%matplotlib inline``, or by a figure of pyplot.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    formatter = getattr(getattr(shell, "display_formatter", None), "formatters", {}).get("image/png")
    if formatter is not None and Figure not in formatter:
        formatter.for_type(Figure, figure_png)
