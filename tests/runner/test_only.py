"""A part of a study: trained, shown, and gone on with."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from normfree.runner import Study, installed_studies, load_preset
from normfree.runner.study_plan import plan_study
from normfree.studies.relu_revival import PAPER

Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("few_rounds")
PRESET = load_preset("smoke")
STUDIES = {name: each for name, each in installed_studies().items() if isinstance(each, Study)}
MEASURED_IN_MINUTES = ("norm-removal", "norm-removal-gap", "norm-removal-scaling")
OF_CODE = ("depth-finetuning",)
"""Its corpus has to hold functions, see tests/studies/test_depth_finetuning.py."""


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in (*MEASURED_IN_MINUTES, *OF_CODE)])
def test_every_study_shows_a_part_of_itself(normfree: Command, preset_file: Path, tmp_path: Path, name: str) -> None:
    label = STUDIES[name].configurations(PRESET)[-1].label
    code, _, err = normfree("study", name, "--preset", preset_file, "--steps", 2, "--only", label, "--out", "study")
    assert code == 0, err
    results = pd.read_csv(tmp_path / "study" / "results.csv")
    assert {STUDIES[name].baseline, label} <= set(results["configuration"])
    assert len(results) <= 3  # a student's teacher beside them
    page = html.unescape((tmp_path / "study" / "report.html").read_text())
    assert label in page
    told = re.sub(r"<style.*?</style>|<pre.*?</pre>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert re.findall(r".{40}(?:\b0 of (?:the )?0\b|: ?\.|\bnan\b).{20}", told) == []
    # A page compares its tokens with those of a paper that it is about.
    assert "training tokens of ReLU's Revival" not in page or PAPER in STUDIES[name].papers


def test_the_rest_can_be_added(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "relu-revival", "--preset", preset_file, "--steps", 2, "--out", "study")
    code, _, err = normfree(*command, "--only", "SM+R")
    assert code == 0, err
    runs = tmp_path / "study" / "runs"
    assert {path.name for path in runs.iterdir()} == {"sm-ln-g", "sm-r"}
    before = (runs / "sm-r" / "seed-0" / "results.csv").stat().st_mtime_ns
    code, _, err = normfree(*command)
    assert code == 0, err
    assert len(pd.read_csv(tmp_path / "study" / "results.csv")) == 4
    assert (runs / "sm-r" / "seed-0" / "results.csv").stat().st_mtime_ns == before
    told = "Configurations have different seeds"
    assert told not in (tmp_path / "study" / "report.html").read_text()
    code, _, err = normfree(*command, "--only", "SM+R", "--seeds", "0,1")
    assert code == 0, err
    page = html.unescape((tmp_path / "study" / "report.html").read_text())
    assert f"{told}: 0, 1 (SM+LN+G, SM+R); 0 (SM+LN+R, SM+G)." in page
    # Without LayerNorm the two share seed 0.
    ppl = pd.read_csv(tmp_path / "study" / "results.csv").set_index(["configuration", "seed"])["eval_ppl"]
    percent = 100 * (ppl["SM+R", 0] / ppl["SM+G", 0] - 1)
    assert f"{100 * (ppl['SM+R'].mean() / ppl['SM+G', 0] - 1):.1f}" != f"{percent:.1f}"
    assert f"ReLU's perplexity is {abs(percent):.1f} % {'higher' if percent > 0 else 'lower'} than GELU's" in page


def test_a_part_of_several_studies(
    normfree: Command, preset_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfree.studies.training_length.SHARES", (0.5, 1.0))
    recipe = {**preset_content["recipe"], "steps": 2, "eval_steps": 2, "save_steps": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**preset_content, "recipe": recipe}))
    command = ("study", "training-length", "--preset", "tiny.yaml", "--only", "SM+R", "--out", "lengths")
    code, _, err = normfree(*command)
    assert code == 0, err
    trained = {path.relative_to(tmp_path / "lengths").as_posix() for path in (tmp_path / "lengths").glob("*/runs/*")}
    assert trained == {f"steps-{n}/runs/{name}" for n in (1, 2) for name in ("sm-ln-g", "sm-r")}
    page = html.unescape((tmp_path / "lengths" / "report.html").read_text())
    assert "normfree study training-length --preset tiny.yaml --out lengths --only SM+R" in page


def test_a_study_that_has_none_of_them_trains_its_baseline(preset_content: dict[str, Any], tmp_path: Path) -> None:
    for name, columns in (("first", ["first.yaml", "second.yaml"]), ("second", [])):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**preset_content, "columns": columns}))
    only = ["SM+LN+R", "layerwise 0.01"]
    plan = plan_study("relu-revival-all", tmp_path / "first.yaml", only=only, timed=False)
    assert plan.groupby("study", sort=False)["configuration"].agg(list).to_dict() == {
        "relu-revival-figures": ["SM+LN+G", "SM+LN+R", "layerwise 0.01"],
        "relu-revival": ["SM+LN+G", "SM+LN+R"],
    }
    alone = plan_study("relu-revival-all", tmp_path / "first.yaml", only=["layerwise 0.01"], timed=False)
    assert alone["configuration"].tolist() == ["SM+LN+G", "layerwise 0.01", "SM+LN+G"]
