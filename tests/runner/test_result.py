"""Studies from Python: a run, the same from its folder, and what a notebook shows."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers.utils import logging

import normfree
from normfree.errors import InputError, RunFailedError
from normfree.locks import locked
from normfree.runner import StudyResult
from tests.small_study import PRESET
from tests.test_measurement import parsed


@pytest.fixture(scope="module")
def preset(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content: dict[str, Any] = {**PRESET, "data": {**PRESET["data"], "corpus": f"directory:{corpus_folder}"}}  # type: ignore[dict-item]
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """What running the study left behind in this process."""
    return {}


@pytest.fixture(scope="module")
def result(preset: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> StudyResult:
    """Two seeds of the four models, trained within a running event loop, as a notebook's cell is."""

    async def cell() -> StudyResult:
        return normfree.run_study(
            "relu-revival",
            preset,
            seeds=(0, np.int64(1)),  # type: ignore[arg-type]
            out=tmp_path_factory.mktemp("studies") / "study",
            steps=2,
            cache_dir=cache,
        )

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist())
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    verbosity, deterministic = logging.get_verbosity(), torch.are_deterministic_algorithms_enabled()
    made = asyncio.run(cell())
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist())
    state["random"] = torch.equal(before[0], after[0]) and before[1:] == after[1:]
    state["handlers"] = handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    state["global"] = (verbosity, deterministic) == (
        logging.get_verbosity(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return made


def test_a_study_leaves_what_the_command_leaves(result: StudyResult) -> None:
    assert result.failures == {}
    assert list(result.table["configuration"]) == ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
    assert (result.table["seeds"] == 2).all()
    assert len(result.results) == 8
    written = pd.read_csv(result.folder / "results.csv")
    pd.testing.assert_frame_equal(written, result.results, check_dtype=False, rtol=1e-12)
    assert result.report == result.folder / "report.html"
    assert result.report.exists()
    assert "headwise-entropy" in result.figures
    assert all(path.suffix == ".png" and path.stat().st_size > 1000 for path in result.figures.values())


def test_numbers_of_the_process_are_left_as_they_were(result: StudyResult, state: dict[str, Any]) -> None:
    assert state == {"random": True, "handlers": True, "global": True}


def test_the_folder_gives_the_same_and_is_only_read(result: StudyResult, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    loaded = normfree.load_study(str(result.folder))
    for name in ("table", "results", "head_entropy", "layer_entropy", "eval_curve"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(result, name))
    assert (loaded.figures, loaded.report, loaded.folder) == (result.figures, result.report, result.folder)
    assert loaded.tables.keys() == {"table"}
    assert repr(loaded) == repr(result)
    assert loaded._repr_html_() == result._repr_html_()
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == before


def test_its_frames_are_those_that_figures_take(result: StudyResult) -> None:
    assert len(result.head_entropy) == 4 * 2 * 2 * 2
    for figure, frame in (
        (normfree.plot.headwise_entropy_heatmaps, result.head_entropy),
        (normfree.plot.headwise_entropy_distribution, result.head_entropy),
        (normfree.plot.layerwise_entropy_dynamics, result.layer_entropy),
        (normfree.plot.evaluation_loss_curves, result.eval_curve),
    ):
        assert figure(frame).axes


def test_a_notebook_shows_the_table(result: StudyResult) -> None:
    page = parsed(result._repr_html_())
    assert sum(tag == "tr" for tag, _ in page.seen) == 1 + 4
    assert "Perplexity" in "".join(page.text)
    shown = repr(result)
    assert shown.startswith("StudyResult(relu-revival: preset tiny; 4 configurations, 8 runs; lowest loss ")
    assert str(result.folder) in shown


def test_running_it_again_trains_nothing_in_any_thread(
    result: StudyResult, preset: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {path: path.stat().st_mtime_ns for path in result.folder.glob("runs/*/*/*")}
    again: list[StudyResult] = []

    def work() -> None:
        options: dict[str, Any] = {"out": result.folder, "steps": 2, "cache_dir": cache}
        again.append(normfree.run_study("relu-revival", str(preset), seeds=range(2), progress=False, **options))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    pd.testing.assert_frame_equal(again[0].table, result.table)
    assert {path: path.stat().st_mtime_ns for path in result.folder.glob("runs/*/*/*")} == runs
    assert capsys.readouterr().out == ""


def test_progress_is_lines_without_control_characters(
    preset: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    made = normfree.run_study(
        "relu-revival", preset, out=tmp_path / "s", only=["SM+R"], changes={"recipe.steps": 2}, cache_dir=cache
    )
    out = capsys.readouterr().out
    assert "Study relu-revival, preset tiny: For tests." in out
    assert "evaluation loss" in out
    assert "\x1b" not in out
    assert "\r" not in out
    assert list(made.table["configuration"]) == ["SM+LN+G", "SM+R"]


def test_a_study_without_its_baseline_is_refused_at_once(result: StudyResult, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_bytes((result.folder / "study.yaml").read_bytes())
    with pytest.raises(InputError, match=r"has no finished run of SM\+LN\+G yet"):
        normfree.load_study(tmp_path / "study")
    with pytest.raises(InputError, match="is no study folder"):
        normfree.load_study(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relu-reviva", {}, "did you mean 'relu-revival'"),
        ("relu-revival", {"preset": "smok"}, "did you mean 'smoke'"),
        ("relu-revival", {"seeds": (0, 0)}, "seeds must be different numbers from 0"),
        ("relu-revival", {"seeds": ()}, "seeds must be different numbers from 0"),
        ("relu-revival", {"seeds": 3}, "seeds must be different numbers from 0"),
        ("relu-revival", {"seeds": (0.5,)}, "seeds must be different numbers from 0"),
        ("relu-revival", {"seeds": (True,)}, "seeds must be different numbers from 0"),
        ("relu-revival", {"tokens": 9, "steps": 9}, "a budget is in tokens or in steps"),
        ("relu-revival", {"changes": {"recipe.lerning_rate": 1}}, "did you mean 'recipe.learning_rate'"),
        ("scaling", {"only": ["SM+X"]}, "SM\\+X"),
        ("relu-revival", {"only": ["SM+X"]}, "SM\\+X"),
        ("relu-revival", {"corpus": "directory:nowhere"}, "nowhere"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    name: str, options: dict[str, Any], message: str, preset: Path, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"preset": preset, "cache_dir": tmp_path / "cache", "progress": False, **options}
    with pytest.raises(InputError, match=message) as error:
        normfree.run_study(name, out=tmp_path / "study", **chosen)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "study").exists()


def test_a_folder_in_use_is_refused(preset: Path, cache: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "study"), pytest.raises(InputError, match="in use"):
        normfree.run_study("relu-revival", preset, out=tmp_path / "study", cache_dir=cache, progress=False)


def test_failed_runs_are_named_and_the_others_shown(
    preset: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normfree.runner.work import Work

    train = Work.train
    broken = {"SM+R"}

    def fails(self: Work, planned: Any, *rest: Any) -> Any:
        if planned.label.split(",")[0].split(" ")[0] in broken:
            raise RunFailedError("it was <unplugged>")
        return train(self, planned, *rest)

    monkeypatch.setattr(Work, "train", fails)
    options: dict[str, Any] = {"out": tmp_path / "s", "only": ["SM+R"], "cache_dir": cache, "steps": 2}
    made = normfree.run_study("relu-revival", preset, progress=False, **options)
    assert made.failures == {"runs/sm-r/seed-0": "it was <unplugged>"}
    assert list(made.table["configuration"]) == ["SM+LN+G"]
    assert "failed runs: 1" in repr(made)
    assert "it was <unplugged>" in "".join(parsed(made._repr_html_()).text)
    broken.add("SM+LN+G")
    with pytest.raises(RunFailedError, match="2 runs failed: "):
        normfree.run_study("relu-revival", preset, progress=False, **{**options, "out": tmp_path / "none"})
