"""Tables of how trained models use their depth, a row a configuration, with intervals over seeds."""

import pandas as pd

from normfree.report.frames import check_frame, in_order
from normfree.report.numbers import mean_and_half

DEPTH_SUMMARY = (
    "configuration",
    "seed",
    "n_layer",
    "loss_nats",
    "effective_depth",
    "useful_layers",
    "deep_half_share",
    "deep_layer_nats",
    "variance_growth",
    "variance_ratio",
)
_MEANS = {
    "effective_depth": "Effective depth",
    "useful_layers": "Useful layers",
    "deep_half_percent": "Deep half's share, %",
    "deep_layer_millinats": "Deep layer, 10⁻³ nats",
    "variance_ratio": "Variance, last over first",
}


def depth_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The diagnostics of :func:`normfree.interpret.measure_depth`: ``mean ± half`` of a 95 % t-interval over seeds.

    The law of the residual stream's variance is named with the number of seeds that have it, where they differ.

    Args:
        summary: the columns ``DEPTH_SUMMARY``, one row a run.

    Raises:
        InputError: a column is missing, or a run occurs twice.
    """
    check_frame(summary, "depth summary", DEPTH_SUMMARY, DEPTH_SUMMARY[2:])
    rows = []
    for configuration in in_order(summary["configuration"]):
        runs = summary[summary["configuration"] == configuration]
        runs = runs.assign(
            deep_half_percent=100 * runs["deep_half_share"], deep_layer_millinats=1000 * runs["deep_layer_nats"]
        )
        laws = runs["variance_growth"].value_counts()
        growth = laws.index[0] if len(laws) == 1 else ", ".join(f"{law} ({n})" for law, n in laws.items())
        cells = {shown: mean_and_half(runs[name]) for name, shown in _MEANS.items()}
        rows.append({"Configuration": configuration, "Seeds": len(runs), **cells, "Variance grows": growth})
    return pd.DataFrame(rows)
