from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from normfree.runner import StudyFolder, load_preset, run_config, telemetry_frame
from normfree.studies.entropy_regularization import OPTIONS, STUDY

Command = Callable[..., tuple[int, str, str]]
WEIGHTS = ("0.001", "0.01", "0.1")
PENALISED = {model: [f"{model}, penalty {weight}" for weight in WEIGHTS] for model in ("SM+G", "SM+R")}
LABELS = ["SM+LN+G", "SM+G", *PENALISED["SM+G"], "SM+R", *PENALISED["SM+R"]]


def test_only_the_objective_sets_the_models_apart() -> None:
    preset = load_preset("smoke")
    runs = {each.label: run_config(preset, each, seed=0) for each in STUDY.configurations(preset)}
    assert list(runs) == LABELS
    for plain, penalised in PENALISED.items():
        for label, weight in zip(penalised, WEIGHTS, strict=True):
            assert runs[label].objective == OPTIONS.model_copy(update={"weight": float(weight)})
            assert runs[label].model_copy(update={"objective": None, "configuration": plain}) == runs[plain]


def test_the_study_leaves_its_tables_and_figures(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, out, err = normfree("study", "entropy-regularization", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    folder = tmp_path / "study"
    assert pd.read_csv(folder / "results.csv")["configuration"].tolist() == LABELS
    assert "SM+R, penalty 0.01" in out
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        "headwise-entropy.png",
        "layerwise-entropy.png",
        "evaluation-loss.png",
        "penalty-weight.png",
        *(f"thresholds-{model}-penalty-{weight}.png" for model in ("sm-g", "sm-r") for weight in WEIGHTS),
    }
    page = (folder / "report.html").read_text()
    assert "SM+G by the weight of the penalty" in page
    assert "Thresholds moved" in page

    heads = telemetry_frame(
        StudyFolder.open(folder).results("runs"), ("entropy_nats", "entropy_threshold_nats"), ("step", "layer", "head")
    )
    assert set(heads["configuration"]) == {label for labels in PENALISED.values() for label in labels}
    start = heads[heads["step"] == 0]["entropy_threshold_nats"]
    np.testing.assert_allclose(start, 0.5 * np.log(np.arange(1, 17)).mean(), rtol=1e-6)
