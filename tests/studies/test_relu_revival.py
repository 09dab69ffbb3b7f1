"""The study from the command line, on a made-up corpus: what it leaves, what it skips, what it says."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from normfree.runner import StudyFolder
from normfree.studies.relu_revival import STUDY
from tests.data.made_up import document, write_documents

Command = Callable[..., tuple[int, str, str]]
LABELS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]


@pytest.mark.drawn
def test_a_study_leaves_tables_figures_and_a_report(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, out, err = normfree("study", "relu-revival", "--preset", preset_file, "--out", "study", "--seeds", "0,1")
    assert code == 0, err
    folder = tmp_path / "study"

    results = pd.read_csv(folder / "results.csv")
    assert results["configuration"].tolist() == LABELS * 2
    assert results["seed"].tolist() == [0] * 4 + [1] * 4
    assert (results["status"] == "finished").all()
    np.testing.assert_allclose(results["eval_ppl"], np.exp(results["eval_loss"]), rtol=1e-12)
    for _, of_seed in results.groupby("seed"):
        ppl = of_seed.set_index("configuration")["eval_ppl"]
        expected = [100 * (ppl[label] / ppl["SM+LN+G"] - 1) for label in LABELS]
        np.testing.assert_allclose(of_seed["delta_percent"], expected, atol=1e-9)

    figures = {path.name for path in (folder / "figures").iterdir()}
    names = [
        "headwise-entropy",
        "entropy-distribution",
        "evaluation-loss",
        "layerwise-entropy",
        "headwise-entropy-published",
    ]
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "2.688" in page
    assert "Published" in page
    for label in LABELS:
        assert label in out
        assert label in page
    assert "80 documents" in page
    assert page.index("A test proves nothing.") < page.index('class="lead"')
    assert 'href="https://arxiv.org/abs/2410.09637"' in page
    assert re.search(r"preset \w+ · 8 runs, \d+ s of training", page)
    assert "softmax attention, which every model here has" in page
    assert '<th scope="colgroup" colspan="2" class="group">Against SM+LN+G</th>' in page
    assert re.search(r"cpu, 1 CPU thread\b[^s]", page)
    assert "evaluation loss" in out  # progress, line by line where there is no terminal


def test_what_is_finished_is_skipped_and_seeds_can_be_added(
    normfree: Command, preset_file: Path, tmp_path: Path
) -> None:
    command = ("study", "relu-revival", "--preset", preset_file, "--out", "study")
    assert normfree(*command)[0] == 0
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("model.safetensors")}
    code, out, _ = normfree(*command, "--seeds", "0,3")
    assert code == 0
    assert "seed 3: step" in out
    assert "seed 0: step" not in out
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert sorted(set(pd.read_csv(tmp_path / "study" / "results.csv")["seed"])) == [0, 3]


def test_a_study_goes_on_with_the_tokens_it_began_with(
    normfree: Command, preset_content: dict[str, Any], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    write_documents(corpus, {f"{seed}.py": document(seed) for seed in range(80)})
    preset = {**preset_content, "data": {**preset_content["data"], "corpus": f"directory:{corpus}"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(preset))
    command = ("study", "relu-revival", "--preset", tmp_path / "mine.yaml", "--out", "study")
    assert normfree(*command)[0] == 0
    write_documents(corpus, {f"{seed}.py": document(seed) for seed in range(80, 120)})
    code, _, err = normfree(*command, "--seeds", "0,1")
    assert code == 0, err
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "study").rglob("config.yaml")]
    assert len(configs) == 8
    assert len({config["provenance"]["corpus_fingerprint"] for config in configs}) == 1


def test_a_stopped_study_goes_on_to_the_same_result(
    normfree: Command, preset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("study", "relu-revival", "--preset", preset_file)
    assert normfree(*command, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        from normfree.training.loop import Training

        steps = iter(range(10))
        step = Training.micro_step

        def interrupted(*arguments: Any, **options: Any) -> object:
            if next(steps) == 7:  # the last step of the second run; its checkpoint is of step 2
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # a second one stops at once
            return step(*arguments, **options)

        patch.setattr(Training, "micro_step", interrupted)
        code, _, err = normfree(*command, "--out", "stopped")
    assert code == 130
    assert "resumes from the last checkpoint" in err
    assert normfree(*command, "--out", "stopped")[0] == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "whole" / "results.csv"), pd.read_csv(tmp_path / "stopped" / "results.csv")
    )


def test_tuned_learning_rates_stand_beside_the_recipes(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    options = ("--out", "study", "--tune-lr", "--only", "SM+R")
    code, out, err = normfree("study", "relu-revival", "--preset", preset_file, *options)
    assert code == 0, err
    folder = StudyFolder.open(tmp_path / "study")
    assert {path.name for path in (tmp_path / "study" / "sweep").iterdir()} == {"sm-ln-g", "sm-r"}
    sweep = pd.DataFrame([result.row for result in folder.results("sweep")])
    assert sorted(set(sweep["learning_rate"])) == [0.00025, 0.0005, 0.001, 0.002, 0.004]
    assert (sweep["steps"] == 2).all()  # one of warm-up, as in the whole run, and a fifth of four steps
    expected = sweep.loc[sweep.groupby("configuration")["eval_loss"].idxmin()].set_index("configuration")
    best = folder.best_learning_rates()
    assert best == expected["learning_rate"].to_dict()

    results = pd.read_csv(tmp_path / "study" / "results.csv")
    tuned = results[results["learning_rate_source"] == "tuned"].set_index("configuration")
    assert tuned["learning_rate"].to_dict() == best
    assert tuned.index.tolist() == ["SM+LN+G", "SM+R"]
    page = (tmp_path / "study" / "report.html").read_text()
    assert "With tuned learning rates" in page
    assert "Not tuned" not in page
    assert page.partition("The sweep: evaluation loss")[2].partition("</table>")[0].count("<tr") == 4
    assert (tmp_path / "study" / "tuned").exists() == any(rate != 0.001 for rate in best.values())
    assert (tmp_path / "study" / "figures" / "headwise-entropy-tuned.pdf").exists()
    assert out.count("SM+R ") >= 2

    # One of SM+R's five trial runs is left, at the recipe's rate. SM+R is no longer shown as tuned.
    shutil.rmtree(tmp_path / "study" / "tuned" / "sm-r", ignore_errors=True)
    for run in (tmp_path / "study" / "sweep" / "sm-r").iterdir():
        if run.name != "learning-rate-0.001":
            (run / "results.csv").unlink()
    assert normfree("report", "study")[0] == 0
    results = pd.read_csv(tmp_path / "study" / "results.csv")
    assert set(results.loc[results["learning_rate_source"] == "tuned", "configuration"]) == {"SM+LN+G"}
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Not tuned: SM+R." in page

    # There is nothing to compare with before the baseline has its own rate.
    next((tmp_path / "study" / "sweep" / "sm-ln-g").glob("*/results.csv")).unlink()
    assert normfree("report", "study")[0] == 0
    assert "With tuned learning rates" not in (tmp_path / "study" / "report.html").read_text()


def test_json_is_the_only_thing_on_standard_output(normfree: Command, preset_file: Path) -> None:
    code, out, _ = normfree("study", "relu-revival", "--preset", preset_file, "--out", "study", "--json")
    assert code == 0
    content = json.loads(out)
    assert [row["configuration"] for row in content["table"]] == LABELS
    assert content["table"][0]["delta_percent"] == 0
    assert content["table"][0]["published_ppl"] == 2.688
    code, again, _ = normfree("report", "study", "--json")
    assert code == 0
    assert json.loads(again) == content


def test_a_study_of_diverging_runs_ends_with_a_report(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    options = ("--set", "recipe.learning_rate=1e30", "--set", "recipe.warmup_ratio=0")
    code, out, err = normfree("study", "relu-revival", "--preset", preset_file, "--out", "study", *options)
    assert code == 0, err
    results = pd.read_csv(tmp_path / "study" / "results.csv")
    diverged = results["status"] == "diverged"
    assert diverged.any()
    table = STUDY.page(StudyFolder.open(tmp_path / "study")).table.set_index("configuration")
    for label in results.loc[diverged, "configuration"]:
        assert not math.isfinite(table.loc[label, "eval_ppl"])
    assert "NaN" in out or "inf" in out
    assert "diverged" in (tmp_path / "study" / "report.html").read_text()


def test_one_run_can_be_trained_again_from_its_own_file(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    assert normfree("study", "relu-revival", "--preset", preset_file, "--out", "study")[0] == 0
    config = tmp_path / "study" / "runs" / "sm-r" / "seed-0" / "config.yaml"
    code, out, err = normfree("train", config, "--out", "again", "--json")
    assert code == 0, err
    results = pd.read_csv(tmp_path / "study" / "results.csv").set_index("configuration")
    assert json.loads(out)["eval_loss"] == results.loc["SM+R", "eval_loss"]
    code, out, _ = normfree("train", config, "--out", "again")
    assert code == 0
    assert "SM+R seed 0: evaluation loss" in out


def test_hostile_names_are_text_in_the_report(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    code, _, err = normfree(
        "study", "relu-revival", "--preset", preset_file, "--out", "study", "--set", f"model_name={name}"
    )
    assert code == 0, err
    page = (tmp_path / "study" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
