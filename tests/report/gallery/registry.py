"""The figures of the gallery by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from matplotlib.figure import Figure

Drawing = Callable[[int, Iterable[str]], Figure]
"""From the number of layers, and the names of what is compared."""

FIGURES: dict[str, Callable[[int], Figure]] = {}


def drawn(figure: Callable[[int], Figure]) -> Callable[[int], Figure]:
    """A figure of the gallery: its function takes the number of layers."""
    FIGURES[figure.__name__] = figure
    return figure


def drawn_for(groups: Mapping[str, Iterable[str]]) -> Callable[[Drawing], Drawing]:
    """A figure of the gallery for each group of models, norms or corpora; a key is how the figure's name ends."""

    def register(figure: Drawing) -> Drawing:
        def of(names: Iterable[str]) -> Callable[[int], Figure]:
            return lambda n_layer: figure(n_layer, names)

        FIGURES.update({figure.__name__ + suffix: of(names) for suffix, names in groups.items()})
        return figure

    return register
