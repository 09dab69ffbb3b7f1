"""Attention entropy by layer and configuration, for models whose layers differ."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree.report.frames import HEAD_ENTROPY, check_frame, check_one_setting, in_order
from normfree.report.style import (
    INK,
    NAN_FACE,
    entropy_colours,
    paper_style,
    readable_on,
)


def layer_entropy_by_configuration(
    head_entropy: pd.DataFrame, *, marked: Mapping[str, Sequence[int]], mark: str, maximum: float
) -> Figure:
    """Entropy by layer (columns) and configuration (rows), mean over heads and seeds, in nats.

    Args:
        head_entropy: columns model, context_length, configuration, seed, layer, head, entropy_nats.
        marked: for each configuration the layers that get a dot.
        mark: what the dot says, such as "GELU".
        maximum: the top of the colour scale, such as the uniform bound.

    Raises:
        InputError: a column is missing, a head occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, ("entropy_nats",))
    check_one_setting(head_entropy, "head_entropy")
    configurations = in_order(head_entropy["configuration"])
    means = head_entropy.groupby(["configuration", "layer"])["entropy_nats"].agg(lambda x: x.mean(skipna=False))
    layers = sorted(in_order(head_entropy["layer"]))
    grid = means.unstack("layer").loc[configurations, layers]
    values = grid.to_numpy(dtype=np.float64)
    with paper_style():
        figure = Figure(figsize=(1.6 + 0.48 * values.shape[1], 0.8 + 0.22 * len(grid)), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(NAN_FACE)
        colours = entropy_colours()
        shown = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=maximum, aspect="auto")
        for row, configuration in enumerate(configurations):
            for column, layer in enumerate(layers):
                value = values[row, column]
                text = f"{value:.2f}" if np.isfinite(value) else "NaN"
                dot = "\N{BULLET} " if layer in marked.get(configuration, ()) else ""
                colour = readable_on(colours, value / maximum) if np.isfinite(value) else INK
                axes.text(column, row, dot + text, ha="center", va="center", fontsize=5.5, color=colour)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_yticks(range(len(grid)), grid.index)
        axes.set_xlabel(f"layer (dot: {mark})")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(shown, ax=axes, aspect=24, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("attention entropy (nats)")
    return figure
