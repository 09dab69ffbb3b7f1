"""The study of outliers from the command line, on a made-up corpus."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from normfree.runner import StudyFolder, final_checkpoint
from normfree.training.records import LAYERS_FILE

Command = Callable[..., tuple[int, str, str]]
LABELS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
MEASURED = ("signal_propagation.parquet", "quantization.parquet")


def test_a_study_measures_its_runs_once(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    # The last step is no multiple of save_steps.
    options = ("--set", "recipe.steps=5", "--set", "recipe.save_steps=2")
    command = ("study", "outliers", "--preset", preset_file, "--out", "study", *options)
    code, out, err = normfree(*command)
    assert code == 0, err
    folder = tmp_path / "study"
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("signal-propagation", "signal-propagation-dynamics")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    page = (folder / "report.html").read_text()
    assert "int8 weights and activations" in page
    assert "Largest channel kurtosis" in page
    assert "Not measured yet" not in page
    for label in LABELS:
        assert label in out

    results = StudyFolder.open(folder).results("runs")
    for result in results:
        assert final_checkpoint(result) == result.folder / "checkpoint-5"
        signal, quantization = (pd.read_parquet(result.folder / name) for name in MEASURED)
        assert signal["layer"].tolist() == [0, 1]
        assert np.isfinite(signal["residual_kurtosis"]).all()
        assert signal["tokens"].tolist() == [result.row["eval_sequences"] * 16] * 2
        # The run was trained and evaluated in float32, so its own evaluation is that of full precision.
        full = quantization.set_index("precision").loc["full_precision"]
        assert full["eval_loss"] == pytest.approx(result.row["eval_loss"], rel=1e-6)
        assert quantization["increase_percent"].iloc[0] == 0
        assert (quantization["increase_percent"].iloc[1:] != 0).all()

    times = {path: path.stat().st_mtime_ns for name in MEASURED for path in folder.rglob(name)}
    assert len(times) == 8
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    code, _, err = normfree("report", "study")  # needs neither the corpus nor the models
    assert code == 0, err
    (tmp_path / "elsewhere").rename(tmp_path / "cache")
    assert normfree(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (folder / "report.html").read_text() == page

    # Runs made by another study: not measured, and one of them from before these statistics were recorded.
    for path in times:
        path.unlink()
    layers = pd.read_parquet(results[0].folder / LAYERS_FILE)
    layers[layers["name"] != "residual_kurtosis"].to_parquet(results[0].folder / LAYERS_FILE)
    assert normfree("report", "study")[0] == 0
    page = (folder / "report.html").read_text()
    assert "No run has been measured yet" in page
    assert "SM+LN+R seed 0" in page
    code, out, err = normfree(*command)
    assert code == 0, err
    assert "seed 0: step" not in out
    page = (folder / "report.html").read_text()
    assert "easured yet" not in page
    assert "The telemetry of 1 run(s) lacks these statistics" in page


def test_a_diverged_run_has_no_final_weights_and_nan_in_the_tables(
    normfree: Command, preset_file: Path, tmp_path: Path
) -> None:
    options = ("--set", "recipe.learning_rate=1e30", "--set", "recipe.warmup_ratio=0")
    code, _, err = normfree("study", "outliers", "--preset", preset_file, "--out", "study", *options)
    assert code == 0, err
    diverged = [each for each in StudyFolder.open(tmp_path / "study").results("runs") if final_checkpoint(each) is None]
    assert diverged
    for result in diverged:
        signal, quantization = (pd.read_parquet(result.folder / name) for name in MEASURED)
        assert signal["layer"].tolist() == [0, 1]
        assert signal["residual_rms"].isna().all()
        assert quantization["eval_ppl"].isna().all()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "NaN" in page


def test_without_torchao_nothing_is_trained(
    normfree: Command, preset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    code, _, err = normfree("study", "outliers", "--preset", preset_file, "--out", "study")
    assert code == 2
    assert err.count("\n") == 1
    assert "pip install 'normfree[quantization]'" in err
    assert not (tmp_path / "study").exists()
