import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from normfree.runner import load_preset, run_config
from normfree.studies.distillation import STUDY

Command = Callable[..., tuple[int, str, str]]
LABELS = [
    "SM+LN+G",
    *("SM+G", "SM+G, distilled", "SM+G, distilled with entropy"),
    *("SM+R", "SM+R, distilled", "SM+R, distilled with entropy"),
]


def test_only_the_objective_sets_the_students_apart() -> None:
    preset = load_preset("smoke")
    runs = {each.label: run_config(preset, each, seed=7) for each in STUDY.configurations(preset)}
    assert list(runs) == LABELS
    for label, run in runs.items():
        alone = runs[label.split(",")[0]]
        assert run.model_copy(update={"objective": None, "configuration": alone.configuration}) == alone
        if run.objective is not None:
            assert run.model_dump()["objective"]["teacher"] == "../../../runs/sm-ln-g/seed-7"


def test_the_study_teaches_and_can_be_moved(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "distillation", "--preset", preset_file)
    code, out, err = normfree(*command, "--out", "study")
    assert code == 0, err
    folder = tmp_path / "study"
    results = pd.read_csv(folder / "results.csv").set_index("configuration")
    assert results.index.tolist() == LABELS
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        "evaluation-loss.png",
        "headwise-entropy.png",
        "layerwise-entropy.png",
    }
    page = (folder / "report.html").read_text()
    assert "The teacher, SM+LN+G, has a perplexity of " in page
    assert "SM+R alone " in page

    folder.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "runs" / "sm-r-distilled")
    code, out, err = normfree(*command, "--out", "moved")
    assert code == 0, err
    assert "SM+R, distilled seed 0: step" in out
    assert "SM+G, distilled seed 0: step" not in out
    again = pd.read_csv(tmp_path / "moved" / "results.csv").set_index("configuration")
    pd.testing.assert_frame_equal(again, results)
    config = yaml.safe_load((tmp_path / "moved" / "runs" / "sm-r-distilled" / "seed-0" / "config.yaml").read_text())
    assert config["objective"]["temperature"] == 2.0


@pytest.mark.parametrize(
    ("configurations", "arguments", "says"),
    [
        (lambda preset: STUDY.configurations(preset)[::-1], (), "unknown teacher of SM+R, distilled with entropy"),
        (STUDY.configurations, ("--tune-lr", "--seeds", "3"), "learns from SM+LN+G of that seed; add it to --seeds"),
    ],
    ids=["behind its student", "of a seed that is not trained"],
)
def test_a_teacher_that_will_be_missing_is_refused_before_training(
    normfree: Command,
    preset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configurations: Callable[..., Any],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.setattr("normfree.studies.distillation.STUDY", replace(STUDY, configurations=configurations))
    code, _, err = normfree("study", STUDY.name, "--preset", preset_file, "--out", "study", *arguments)
    assert code == 2
    assert says in err
    assert not (tmp_path / "study").exists()
