"""The curve of a removal and its control: loss by step, tokens and norms removed.

    python -m examples.real_models.removal FOLDER CURVE.csv [FIGURE.png ORIGINAL_LOSS]

FOLDER is the output folder of ``normfree remove-norm``, finished or not; the figure needs the original's loss in nats.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.columns import EVAL_LOSS, TRAIN_LOSS
from normfree.files import write_text
from normfree.removal.finetuning import REMOVAL_FILE, STRETCH
from normfree.removal.layout import NORM_FREE, ORIGINAL, REMOVAL_FOLDER, SCHEDULE_FILE, VANILLA
from normfree.removal.schedule import SPECIAL_PARTS, load_schedule
from normfree.removal.std_losses import LARGEST_RATIO
from normfree.report.style import DASHED, INK, ONE_COLUMN, paper_style
from normfree.training.objectives import CROSS_ENTROPY
from normfree.training.pretrained import load_pretrained
from normfree.training.records import METRICS_FILE
from normfree.training.run_config import load_run_config
from normfree.training.run_folder import CONFIG_FILE

MEASURED = {TRAIN_LOSS: "train_loss", CROSS_ENTROPY: "train_loss", EVAL_LOSS: "eval_loss", LARGEST_RATIO: LARGEST_RATIO}


def curve(folder: Path) -> pd.DataFrame:
    """variant, step, tokens, parts_removed, train_loss and eval_loss (nats), largest_std_over_median; a row a step.

    Parts are norms by reader: an attention norm has two, queries and keys, and values.
    """
    removed = removal_steps(folder)
    rows = []
    for variant, place in ((VANILLA, VANILLA), (NORM_FREE, REMOVAL_FOLDER)):
        path = folder / place / METRICS_FILE
        if not path.exists():
            continue
        metrics = pd.read_parquet(path)
        if variant == NORM_FREE:
            metrics = metrics[metrics["name"] != TRAIN_LOSS]  # it holds the auxiliary losses
        metrics = metrics[metrics["name"].isin(MEASURED)].replace({"name": MEASURED})
        table = metrics.pivot_table(index=["step", "tokens"], columns="name", values="value").reset_index()
        gone = [sum(each < step for each in removed) if variant == NORM_FREE else 0 for step in table["step"]]
        rows.append(table.assign(variant=variant, parts_removed=gone))
    frame = pd.concat(rows, ignore_index=True)
    columns = ["variant", "step", "tokens", "parts_removed", "train_loss", "eval_loss", LARGEST_RATIO]
    return frame.reindex(columns=columns).round(4)


def removal_steps(folder: Path) -> list[int]:
    """The step before which each norm's part went or will go, stretches included."""
    schedule = load_schedule(str(folder / SCHEDULE_FILE))
    run = load_run_config(folder / REMOVAL_FOLDER / CONFIG_FILE)
    assert run.start_from is not None, "a removal starts from a model"
    config = load_pretrained(run.start_from).as_normfree().config
    path = folder / REMOVAL_FOLDER / REMOVAL_FILE
    for each in json.loads(path.read_text())["stretches"] if path.exists() else []:
        schedule = schedule.stretched(config, each["step"], STRETCH)
    return [each.step for each in schedule.removals(config) if each.part not in SPECIAL_PARTS]


@paper_style()
def progress(found: pd.DataFrame, original: float) -> Figure:
    """Evaluation loss with norms going and kept, and below it how many are gone and how massive tokens still are.

    Args:
        found: of :func:`curve`.
        original: evaluation loss before fine-tuning, nats.
    """
    figure = Figure(figsize=(ONE_COLUMN * 1.35, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    for variant, colour in ((VANILLA, "#0072B2"), (NORM_FREE, "#D55E00")):
        evaluated = found[(found["variant"] == variant) & found["eval_loss"].notna()]
        if len(evaluated):
            above.plot(evaluated["tokens"], evaluated["eval_loss"], "-o", markersize=2.4, color=colour, label=variant)
    above.axhline(original, **DASHED, label=ORIGINAL)
    above.set_ylabel("evaluation loss (nats)")
    above.legend()
    own = found[found["variant"] == NORM_FREE]
    below.step(own["tokens"], own["parts_removed"], where="post", color=INK)
    below.set(ylabel="norms gone", xlabel="fine-tuning tokens")
    ratio = below.twinx()
    ratio.plot(own["tokens"], own[LARGEST_RATIO], color="#009E73", linewidth=0.5)
    ratio.set_yscale("log")
    ratio.set_ylabel("largest std / median", color="#009E73")
    ratio.grid(visible=False)
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


if __name__ == "__main__":
    found = curve(Path(sys.argv[1]))
    write_text(Path(sys.argv[2]), found.to_csv(index=False))
    if len(sys.argv) > 3:
        progress(found, float(sys.argv[4])).savefig(sys.argv[3], dpi=200)
