"""The figures of the gallery by name."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[int], Figure]] = {}


def drawn(figure: Callable[[int], Figure]) -> Callable[[int], Figure]:
    """A figure of the gallery: its function takes the number of layers."""
    FIGURES[figure.__name__] = figure
    return figure
