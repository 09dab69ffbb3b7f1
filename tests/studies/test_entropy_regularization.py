from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from normfree.studies import StudyFolder, load_preset
from normfree.studies.entropy_regularization import OPTIONS, STUDY
from normfree.studies.frames import threshold_frame
from normfree.studies.study import run_config

Command = Callable[..., tuple[int, str, str]]
LABELS = ["SM+LN+G", "SM+G", "SM+G, penalty", "SM+R", "SM+R, penalty"]


def test_only_the_objective_sets_the_pairs_apart() -> None:
    preset = load_preset("smoke")
    runs = {each.label: run_config(preset, each, seed=0) for each in STUDY.configurations(preset)}
    assert list(runs) == LABELS
    for plain in ("SM+G", "SM+R"):
        penalised = runs[f"{plain}, penalty"]
        assert penalised.objective == OPTIONS
        assert penalised.model_copy(update={"objective": None, "configuration": plain}) == runs[plain]


def test_the_study_leaves_its_tables_and_figures(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, out, err = normfree("study", "entropy-regularization", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    folder = tmp_path / "study"
    assert pd.read_csv(folder / "results.csv")["configuration"].tolist() == LABELS
    assert "SM+R, penalty" in out
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        "headwise-entropy.png",
        "layerwise-entropy.png",
        "evaluation-loss.png",
        "thresholds-sm-g-penalty.png",
        "thresholds-sm-r-penalty.png",
    }
    page = (folder / "report.html").read_text()
    assert "With the penalty, " in page
    assert "Thresholds moved" in page

    heads = threshold_frame(StudyFolder.open(folder).results("runs"))
    assert set(heads["configuration"]) == {"SM+G, penalty", "SM+R, penalty"}
    start = heads[heads["step"] == 0]["entropy_threshold_nats"]
    np.testing.assert_allclose(start, 0.5 * np.log(np.arange(1, 17)).mean(), rtol=1e-6)
