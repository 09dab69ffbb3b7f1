import math
from pathlib import Path

import pandas as pd

from normfree.training.records import LAYERS_FILE, METRICS_FILE, RunRecords


def filled(folder: Path, steps: range) -> RunRecords:
    records = RunRecords(folder)
    for step in steps:
        records.add_layer(step, 0, 1, "entropy_nats", step / 2)
        records.add_layer(step, 0, None, "residual_rms", math.nan)
        records.add_metric(step + 1, 10 * (step + 1), float(step), "train_loss", math.inf)
    return records


def test_rows_come_back_with_their_types_and_with_nan_and_inf(tmp_path: Path) -> None:
    filled(tmp_path, range(2)).flush()
    layers, metrics = pd.read_parquet(tmp_path / LAYERS_FILE), pd.read_parquet(tmp_path / METRICS_FILE)
    assert layers["head"].dtype == "Int64"
    assert layers["head"].isna().tolist() == [False, True, False, True]
    assert layers["value"].iloc[2] == 0.5
    assert layers["value"].isna().tolist() == [False, True, False, True]
    assert metrics["value"].tolist() == [math.inf, math.inf]
    assert metrics[["step", "tokens"]].to_numpy().tolist() == [[1, 10], [2, 20]]


def test_going_on_from_a_checkpoint_leaves_each_row_once(tmp_path: Path) -> None:
    filled(tmp_path, range(5)).flush()  # five steps were trained, the last checkpoint is of step 3
    records = RunRecords(tmp_path)
    records.rewind(3)
    assert records.wall_seconds == 2.0
    again = filled(tmp_path, range(3, 6))
    again.rewind(3)
    for step in range(3, 6):
        again.add_layer(step, 0, 1, "entropy_nats", step / 2)
        again.add_metric(step + 1, 10 * (step + 1), float(step), "train_loss", 0.0)
    again.flush()
    layers = pd.read_parquet(tmp_path / LAYERS_FILE).query("name == 'entropy_nats'")
    assert layers["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert pd.read_parquet(tmp_path / METRICS_FILE)["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_nothing_temporary_is_left(tmp_path: Path) -> None:
    filled(tmp_path, range(1)).flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAYERS_FILE, METRICS_FILE]
