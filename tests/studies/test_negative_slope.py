"""Fixed negative slopes from the command line: what the report says of runs that break, and of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from normfree.runner import load_preset, run_config
from normfree.studies.negative_slope.study import LEAKY, STUDY, _lead, what_nan_means
from normfree.training import Recipe

Command = Callable[..., tuple[int, str, str]]
LABELS = ["SM+R", "SM+L 0.01", "SM+L 0.05", "SM+L 0.1", "SM+L 0.2"]


def runs(first_nan: dict[int, list[float | None]], collapse: dict[int, list[float | None]]) -> pd.DataFrame:
    """Runs of the four slopes by seed, with the steps of their events."""
    rows = [
        {"configuration": label, "seed": seed, "status": "finished", "step": nan, "collapse_0.1": low}
        for seed in first_nan
        for label, nan, low in zip(LABELS[1:], first_nan[seed], collapse[seed], strict=True)
    ]
    return pd.DataFrame(rows).astype({"step": "Int64", "collapse_0.1": "Int64"})


def test_the_slopes_are_the_papers() -> None:
    preset = load_preset("cpu")
    configurations = STUDY.configurations(preset)
    assert [each.label for each in configurations] == LABELS
    assert [each.slug for each in configurations] == ["sm-r", "sm-l-0.01", "sm-l-0.05", "sm-l-0.1", "sm-l-0.2"]
    models = [run_config(preset, each, 0).build_model_config(512) for each in configurations]
    assert {model.norm for model in models} == {"none"}
    assert {model.final_norm for model in models} == {"layernorm"}
    assert [model.activations[0] for model in models] == ["relu"] + ["leaky_relu"] * 4
    assert [model.negative_slope for model in models[1:]] == [0.01, 0.05, 0.1, 0.2]
    assert STUDY.baseline == "SM+R"


def test_a_study_of_finite_runs(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "negative-slope", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    results = pd.read_csv(tmp_path / "study" / "results.csv")
    assert results["configuration"].tolist() == LABELS
    assert results["eval_loss"].nunique() == 5
    page = (tmp_path / "study" / "report.html").read_text()
    assert "First NaN or Inf: SM+R never, SM+L 0.01 never" in page
    assert "no order to compare" in page
    assert "These runs are in fp32" in page
    assert "2.936" not in page  # published Δ % are to another baseline
    figures = {path.name for path in (tmp_path / "study" / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in ("instability", "evaluation-loss") for kind in ("png", "pdf")}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_runs_of_nans_end_with_a_report(normfree: Command, preset_file: Path, tmp_path: Path, precision: str) -> None:
    options = [f"recipe.precision={precision}", "recipe.learning_rate=1e30", "recipe.warmup_ratio=0"]
    options += ["recipe.attn_implementation=eager", "recipe.telemetry_steps=1"]
    words = [word for option in options for word in ("--set", option)]
    code, out, err = normfree("study", "negative-slope", "--preset", preset_file, "--out", "study", *words)
    assert code == 0, err
    assert "Traceback" not in out + err
    results = pd.read_csv(tmp_path / "study" / "results.csv")
    assert (results["status"] == "diverged").all()
    assert results["eval_loss"].isna().all()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "First NaN or Inf: SM+R step 1, SM+L 0.01 step 1, SM+L 0.05 step 1" in page
    assert f"These runs are in {precision}" in page
    assert page.count("data:image/png;base64,") == 2
    layers = pd.read_parquet(tmp_path / "study" / "runs" / "sm-l-0.2" / "seed-0" / "layers.parquet")
    nan = layers[layers["name"] == "residual_nan_count"].groupby("step")["value"].sum()
    assert nan.index.tolist() == [0, 1, 2, 3]
    assert nan[0] == 0
    assert (nan[1:] > 0).all()


@pytest.mark.parametrize(
    ("first_nan", "verdict"),
    [
        ({0: [None, 400, 200, 50]}, "The larger the fixed slope, the earlier (or at the same step), as the paper"),
        ({0: [400, 400, 200, 200]}, "The larger the fixed slope, the earlier (or at the same step), as the paper"),
        ({0: [50, 50, 50, 50]}, "This is not the paper's order"),
        ({0: [50, 100, 150, None]}, "This is not the paper's order"),
        ({0: [None] * 4, 1: [None] * 4}, "It happened at none of the fixed slopes"),
        ({0: [None, 400, 200, 50], 1: [None] * 4}, "the earlier (or at the same step) in 1 of 2 seeds, as the paper"),
        ({0: [50, 60, 70, 80], 1: [None] * 4}, "not the paper's order (the larger the slope, the earlier) in any seed"),
    ],
)
def test_the_lead_says_whether_the_order_is_the_papers(first_nan: dict[int, Any], verdict: str) -> None:
    never: dict[int, Any] = {seed: [None] * 4 for seed in first_nan}
    nan_first, collapse_first = _lead(runs(first_nan, never)), _lead(runs(never, first_nan))
    assert verdict in nan_first.split("Entropy collapse")[0]
    assert verdict in collapse_first.split("Entropy collapse")[1]


def test_a_slope_that_is_still_to_be_trained_is_not_one_without_nans() -> None:
    frame = runs({0: [None, 400, 200, 50]}, {0: [None] * 4})
    lead = _lead(frame[frame["configuration"] != LEAKY[0].label])
    assert "Not every fixed slope has been trained yet" in lead
    assert "SM+L 0.01" not in lead


def test_several_seeds_stand_side_by_side() -> None:
    lead = _lead(runs({0: [None, 400, 200, 50], 1: [900, 400, 200, 100]}, {0: [None] * 4, 1: [None] * 4}))
    assert "SM+L 0.01 never / step 900, SM+L 0.05 step 400 / step 400" in lead
    assert "in 2 of 2 seeds" in lead


@pytest.mark.parametrize(
    ("precision", "attention", "says"),
    [
        ("bf16", "eager", "a training that diverged"),
        ("fp32", "sdpa", "a training that diverged"),
        ("fp16", "eager", "overflow like all others"),
        ("fp16", "sdpa", "the model never saw them"),
    ],
)
def test_the_report_says_where_its_nans_come_from(precision: Any, attention: Any, says: str) -> None:
    text = what_nan_means(Recipe(steps=1, precision=precision, attn_implementation=attention))
    assert says in text
