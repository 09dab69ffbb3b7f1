"""``recipe.report_to``: a tracker has the rows of metrics.parquet, those of a resumed run once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.training import RunConfig, train

from .test_trainer import StopAt, assert_same


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """The rows of metrics.parquet: values by step, by name."""
    metrics = pd.read_parquet(folder / "metrics.parquet")
    return {str(name): dict(zip(rows["step"], rows["value"], strict=True)) for name, rows in metrics.groupby("name")}


def stopped_and_resumed(run: RunConfig, data: PackedData, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run, data, folder, callbacks=(StopAt(5),))
    train(run, data, folder)


def test_tensorboard_has_every_metric_of_a_resumed_run_once(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tiny_run(report_to="tensorboard", model={"embedding_dropout": 0.1})
    stopped_and_resumed(run, data, tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = logged(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == list(values), name
        assert [each.value for each in scalars] == pytest.approx(list(values.values()), rel=1e-6)
    # It is no part of what a run is, and changes nothing in it.
    plain = train(tiny_run(model={"embedding_dropout": 0.1}), data, tmp_path / "plain")
    assert_same(plain, train(tiny_run(model={"embedding_dropout": 0.1}), data, tmp_path / "run"))


def test_trackio_continues_the_run_and_leaves_standard_output_alone(
    data: PackedData,
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    stopped_and_resumed(tiny_run(report_to="trackio"), data, tmp_path / "run")
    assert capsys.readouterr().out == ""
    (name,) = SQLiteStorage.get_runs("normfree")
    assert name.startswith("tiny SM+LN+G seed 0 ")
    rows = SQLiteStorage.get_logs("normfree", name)
    # Steps 4 and 5 were logged again after the checkpoint of step 3.
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 4, 5, 6]
    expected = logged(tmp_path / "run")
    for row in rows:
        for metric in ("train_loss", "eval_loss", "grad_norm", "learning_rate"):
            assert metric not in row or row[metric] == pytest.approx(expected[metric][row["step"]])


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"report_to {tracker} needs the package {tracker}; .*pip install {tracker}"):
        train(tiny_run(report_to=tracker), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
