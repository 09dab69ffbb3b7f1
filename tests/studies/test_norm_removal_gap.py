"""Ways to remove norms: the choice of rates and control, paired intervals, and the study from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from normfree.removal.schedule import automatic_schedule, load_schedule
from normfree.runner import load_preset
from normfree.studies.norm_removal.gap import GOAL, STUDY, WAYS, formatted_gaps, gap_by_way, gap_frame, gap_table
from normfree.studies.norm_removal.removing import DEFAULT, Way
from normfree.studies.norm_removal.tables import REMOVALS

Command = Callable[..., tuple[int, str, str]]
ZERO = Way("rate to zero", recipe={"final_learning_rate_ratio": 0.0}, control=True)
RAMP = Way("ramp", ramp_share=0.05)
LOSSES = {  # by variant and rate: seeds 0, 1, 2
    ("original", 1e-4): [3.00, 3.10, 2.90],
    ("original", 1e-3): [3.00, 3.10, 2.90],
    ("vanilla", 1e-4): [3.01, 3.10, 2.91],
    ("vanilla", 1e-3): [3.20, 3.30, 3.10],
    ("vanilla, rate to zero", 1e-4): [3.00, 3.09, 2.90],
    ("vanilla, rate to zero", 1e-3): [2.90, 2.80, np.nan],
    ("norm-free", 1e-4): [3.10, 3.22, 3.01],
    ("norm-free", 1e-3): [3.05, 3.16, 2.94],
    ("rate to zero", 1e-4): [3.04, 3.13, 2.93],
    ("rate to zero", 1e-3): [3.01, 3.11, 2.92],
    ("ramp", 1e-4): [3.02, 3.12],
    ("ramp", 1e-3): [3.03, 3.13, np.nan],
}


def removals() -> pd.DataFrame:
    rows = [
        ("small", 0.05, rate, seed, variant, 1000, loss)
        for (variant, rate), losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows, columns=list(REMOVALS))


def test_the_control_is_the_best_of_all_and_differences_are_of_the_same_seed() -> None:
    gaps = gap_frame(removals(), (DEFAULT, ZERO, RAMP))
    control = np.array(LOSSES["vanilla, rate to zero", 1e-4])
    default, zero = np.array(LOSSES["norm-free", 1e-3]), np.array(LOSSES["rate to zero", 1e-3])
    assert gaps["way"].unique().tolist() == ["norm-free", "rate to zero", "ramp"]
    np.testing.assert_allclose(gaps.loc[gaps["way"] == "norm-free", "gap_nats"], default - control)
    assert gaps.loc[gaps["way"] == "ramp", "gap_nats"].isna().all(), "no rate has a loss of every seed"
    table = gap_table(gaps).set_index("way")
    assert table["learning_rate"].tolist()[:2] == [1e-3, 1e-3]
    for name, differences in (("gap", zero - control), ("gain", default - zero)):
        found: Any = table.loc["rate to zero", name]
        expected = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
        np.testing.assert_allclose((found.mean, found.low, found.high), (differences.mean(), *expected))
    missing: Any = table.loc["ramp", "gap"]
    assert np.isnan(missing.mean)
    shown = formatted_gaps(gap_table(gaps)).set_index("Way")
    assert shown.loc["rate to zero", "Norm-free − control"] == "+0.0167 ± 0.0143"
    assert list(shown.loc["default", ["Closed", "Budget", "Seeds"]]) == ["", "5 %", "3"]
    assert shown.loc["ramp", "Loss"] == "NaN"


def test_a_fine_tuning_that_makes_it_worse_is_no_control() -> None:
    frame = removals()
    gaps = gap_frame(frame[~frame["variant"].str.startswith("vanilla")], (DEFAULT, ZERO, RAMP))
    assert gaps.loc[gaps["way"] == "norm-free", "control"].tolist() == LOSSES["original", 1e-3]


def test_the_figure_shows_seeds_and_what_is_missing() -> None:
    gaps = gap_frame(removals(), (DEFAULT, ZERO, RAMP)).drop(columns="share")
    figure = gap_by_way(gaps, goal=GOAL)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["default", "rate to zero", "ramp"]
    dots = [np.asarray(points.get_offsets()) for points in axes.collections]
    np.testing.assert_allclose(dots[0][:, 0], gaps.loc[gaps["way"] == "norm-free", "gap_nats"])
    assert [text.get_text().strip() for text in axes.texts if "missing" in text.get_text()] == ["diverged or missing"]
    assert any(np.allclose(line.get_xdata(), GOAL) for line in axes.lines)


def test_ways_change_only_what_they_name() -> None:
    automatic = automatic_schedule(6, 200)
    assert DEFAULT.changed(automatic, 200) == automatic
    for way in WAYS:
        schedule = way.changed(automatic, 200)
        changed = {name for name in type(schedule).model_fields if getattr(schedule, name) != getattr(automatic, name)}
        assert changed == {*way.schedule, *(["ramp_steps"] if way.ramp_share else [])}, way.label
    assert len({way.place(Path("run"), 0.05, 1e-3) for way in WAYS}) == len(WAYS)
    assert DEFAULT.place(Path("run"), 0.05, 1e-3) == Path("run/removals/budget-0.05/learning-rate-0.001")


def test_every_schedule_of_the_presets_leaves_steps_to_recover_in() -> None:
    for name in STUDY.presets:
        assert STUDY.measurement is not None
        STUDY.measurement(load_preset(name)).check()


def test_every_way_is_tried_and_shown(normfree: Command, preset_content: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**preset_content["recipe"], "steps": 12, "eval_steps": 12, "save_steps": 12}
    removal = {"budget_shares": [1.0], "learning_rates": [1e-3]}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**preset_content, "recipe": recipe, "removal": removal}))
    command = ("study", "norm-removal-gap", "--preset", path, "--out", "study", "--only", "GPT-2 style")
    code, _, err = normfree(*command)
    assert code == 0, err
    folder = tmp_path / "study"
    gaps = pd.read_csv(folder / "gaps.csv")
    assert gaps["way"].tolist() == [way.label for way in WAYS]
    assert np.isfinite(gaps["gap_nats"]).all()
    run = folder / "runs" / "gpt-2-style" / "seed-0"
    automatic = automatic_schedule(preset_content["model"]["n_layer"], 12)
    for way in WAYS:
        place, expected = way.place(run, 1.0, 1e-3), way.changed(automatic, 12)
        found = load_schedule(str(place / "schedule.yaml"))
        assert found == expected, way.label
        assert (place / "removal" / "norm-costs.csv").exists() == (expected.order == "auto")
        assert (place / "vanilla").exists() == way.control, way.label
    assert "of the training tokens:" in (folder / "report.html").read_text()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("removal.csv")}
    assert len(times) == len(WAYS)
    assert normfree(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
