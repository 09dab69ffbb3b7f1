"""What a model loses when layers are taken out of it, in several orders."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normfree.errors import InputError
from normfree.report.frames import check_frame, in_order
from normfree.report.style import QUIET, TWO_COLUMN, paper_style

PRUNED_LOSSES = ("model", "order", "n_dropped", "loss_increase_nats", "standard_error")

# Okabe and Ito's colours that no configuration has
_COLOURS = ("#009E73", "#CC79A7", "#332288", "#999933")
_MARKERS = ("o", "s", "^", "D")


def pruned_layer_losses(losses: pd.DataFrame) -> Figure:
    """A panel a model: the increase of the loss over the number of layers dropped, a line an order of dropping.

    Whiskers are 95 % intervals (1.96 standard errors). Increases that are not finite break the line.

    Args:
        losses: model, order, n_dropped, loss_increase_nats, standard_error.

    Raises:
        InputError: a column is missing, a number of an order occurs twice, or there are more than four orders.
    """
    check_frame(losses, "pruned losses", PRUNED_LOSSES, PRUNED_LOSSES[-2:])
    models, orders = in_order(losses["model"]), in_order(losses["order"])
    if len(orders) > len(_COLOURS):
        raise InputError(f"the pruned losses frame has {len(orders)} orders; at most {len(_COLOURS)} can be told apart")
    with paper_style():
        figure = Figure(figsize=(min(TWO_COLUMN, 0.6 + 3.0 * len(models)), 2.4), layout="constrained")
        (panels,) = figure.subplots(1, len(models), sharey=True, squeeze=False)
        for axes, model in zip(panels, models, strict=True):
            for order, colour, marker in zip(orders, _COLOURS, _MARKERS, strict=False):
                rows = losses[(losses["model"] == model) & (losses["order"] == order)].sort_values("n_dropped")
                increase = rows["loss_increase_nats"].where(np.isfinite(rows["loss_increase_nats"]))
                error = 1.96 * rows["standard_error"].where(np.isfinite(rows["standard_error"]))
                line = {"color": colour, "marker": marker, "markersize": 3, "label": order}
                axes.errorbar(rows["n_dropped"], increase, error, elinewidth=0.7, **line)
            axes.axhline(0, color=QUIET, linewidth=0.6, zorder=1)
            axes.set_title(model)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.set_xlabel("layers dropped")
        panels[0].set_ylabel("increase of the loss (nats per token)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(orders), handlelength=1.6)
    return figure
