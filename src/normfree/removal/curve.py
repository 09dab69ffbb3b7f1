"""The curve of a removal and of its control: loss by step, tokens and norms gone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.columns import EVAL_LOSS, TRAIN_LOSS
from normfree.files import write_text
from normfree.removal.finetuning import recorded_removals
from normfree.removal.layout import CURVE_FILE, NORM_FREE, ORIGINAL, REMOVAL_FOLDER, TABLE_FILE, VANILLA
from normfree.removal.parts import SPECIAL_PARTS
from normfree.removal.schedule import Removal
from normfree.removal.std_losses import LARGEST_RATIO
from normfree.report import FIGURES_FOLDER, save_figure
from normfree.report.style import DASHED, INK, ONE_COLUMN, paper_style
from normfree.training.objectives import CROSS_ENTROPY
from normfree.training.records import METRICS_FILE

GONE = "parts_removed"
_NAMES = {TRAIN_LOSS: TRAIN_LOSS, CROSS_ENTROPY: TRAIN_LOSS, EVAL_LOSS: EVAL_LOSS, LARGEST_RATIO: LARGEST_RATIO}
VARIANT_COLOURS = {VANILLA: "#0072B2", NORM_FREE: "#D55E00"}


def write_curve(folder: Path) -> None:
    """Writes ``curve.csv`` and the figure ``removal-curve`` of the removal in ``folder``, which has ended."""
    curve = removal_curve(folder, recorded_removals(folder / REMOVAL_FOLDER))
    table = pd.read_csv(folder / TABLE_FILE).set_index("variant")
    original = float(table[EVAL_LOSS][ORIGINAL])
    write_text(folder / CURVE_FILE, curve.to_csv(index=False, na_rep="nan"))
    save_figure(loss_and_norms_gone(curve, original), folder / FIGURES_FOLDER, "removal-curve")


def removal_curve(folder: Path, removals: Sequence[Removal]) -> pd.DataFrame:
    """A row a logged step of the control, if there is one, and of the removal.

    Parts are norms by reader: an attention norm has two, queries and keys, and values.

    Returns:
        variant, step (from 1), tokens, parts_removed, train_loss (cross-entropy of the batch) and eval_loss (NaN
        between evaluations), nats per token, and largest_std_over_median (NaN without a penalty on massive tokens).
    """
    steps = [each.step for each in removals if each.part not in SPECIAL_PARTS]
    tables = []
    for variant, place in ((VANILLA, VANILLA), (NORM_FREE, REMOVAL_FOLDER)):
        path = folder / place / METRICS_FILE
        if not path.exists():
            continue
        metrics = pd.read_parquet(path)
        if CROSS_ENTROPY in set(metrics["name"]):
            metrics = metrics[metrics["name"] != TRAIN_LOSS]  # it holds the auxiliary losses
        metrics = metrics[metrics["name"].isin(_NAMES)].replace({"name": _NAMES})
        table = metrics.pivot(index=["step", "tokens"], columns="name", values="value").reset_index()
        gone = [sum(each < step for each in steps) if variant == NORM_FREE else 0 for step in table["step"]]
        tables.append(table.assign(**{"variant": variant, GONE: gone}))
    columns = ["variant", "step", "tokens", GONE, TRAIN_LOSS, EVAL_LOSS, LARGEST_RATIO]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


@paper_style()
def loss_and_norms_gone(curve: pd.DataFrame, original: float) -> Figure:
    """Evaluation loss with norms going and kept; below it how many are gone, and how massive tokens still are.

    Args:
        curve: see :func:`removal_curve`.
        original: evaluation loss before fine-tuning, nats per token.
    """
    figure = Figure(figsize=(1.35 * ONE_COLUMN, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    for variant, colour in VARIANT_COLOURS.items():
        evaluated = curve[(curve["variant"] == variant) & curve[EVAL_LOSS].notna()]
        if len(evaluated):
            above.plot(evaluated["tokens"], evaluated[EVAL_LOSS], "-o", markersize=2.4, color=colour, label=variant)
    above.axhline(original, **DASHED, label=ORIGINAL)
    above.set_ylabel("evaluation loss (nats)")
    above.legend()
    own = curve[curve["variant"] == NORM_FREE]
    below.step(own["tokens"], own[GONE], where="post", color=INK)
    below.set(ylabel="norms gone, by reader", xlabel="fine-tuning tokens", xlim=(0, None))
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    if own[LARGEST_RATIO].notna().any():
        ratio = below.twinx()
        ratio.plot(own["tokens"], own[LARGEST_RATIO], color="#009E73", linewidth=0.5)
        ratio.set_yscale("log")
        ratio.set_ylabel("largest std / median", color="#009E73")
        ratio.grid(visible=False)
    return figure
