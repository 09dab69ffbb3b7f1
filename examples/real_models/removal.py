"""The curve of a removal and its control: loss by step, tokens and norms removed.

    python -m examples.real_models.removal FOLDER CURVE.csv

FOLDER is the output folder of ``normfree remove-norm``, finished or not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from normfree.columns import EVAL_LOSS, TRAIN_LOSS
from normfree.files import write_text
from normfree.removal.finetuning import REMOVAL_FILE, STRETCH
from normfree.removal.removal import NORM_FREE, REMOVAL_FOLDER, SCHEDULE_FILE, VANILLA
from normfree.removal.schedule import SPECIAL_PARTS, load_schedule
from normfree.removal.std_losses import LARGEST_RATIO
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


if __name__ == "__main__":
    write_text(Path(sys.argv[2]), curve(Path(sys.argv[1])).to_csv(index=False))
