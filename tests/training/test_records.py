import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from normfree.errors import InputError
from normfree.training import records as growing
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


def test_what_is_written_in_many_flushes_is_what_one_would_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "ROWS_IN_MEMORY", 7)
    records = RunRecords(tmp_path / "many")
    for step in range(20):
        for layer in range(3):
            records.add_layer(step, layer, None if layer else 2, "residual_rms", step / 3 + layer)
        if step % 4 == 1:
            records.flush()
    records.rewind(17)
    records.flush()
    expected = pd.DataFrame(
        [
            (step, layer, None if layer else 2, "residual_rms", step / 3 + layer)
            for step in range(17)
            for layer in range(3)
        ],
        columns=list(growing.LAYERS_COLUMNS),
    ).astype(growing.LAYERS_COLUMNS)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "many" / LAYERS_FILE), expected)
    with pq.ParquetFile(tmp_path / "many" / LAYERS_FILE) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert max(sizes) <= 7, "no more than that is in memory at once"
    assert min(sizes[:-2]) == 7, "small row groups of earlier flushes become whole ones"


def test_a_table_that_did_not_grow_is_not_written_again(tmp_path: Path) -> None:
    records = filled(tmp_path, range(3))
    records.flush()
    before = (tmp_path / LAYERS_FILE).stat()
    records.add_metric(4, 40, 3.0, "eval_loss", 1.0)
    records.flush()
    assert (tmp_path / LAYERS_FILE).stat().st_ino == before.st_ino
    assert len(pd.read_parquet(tmp_path / METRICS_FILE)) == 4


def test_damage_within_a_table_is_found_before_the_run_goes_on(tmp_path: Path) -> None:
    filled(tmp_path, range(500)).flush()
    path = tmp_path / LAYERS_FILE
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the footer is whole
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        RunRecords(tmp_path)
