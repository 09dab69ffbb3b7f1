"""What the legend of a figure says."""

from __future__ import annotations

from matplotlib.axes import Axes


def legend_texts(axes: Axes) -> list[str]:
    """The entries of the legend of ``axes``, which has one."""
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]
