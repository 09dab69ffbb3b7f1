"""A study of four short runs, trained once in this process: what every executor has to leave, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from normfree.locks import locked
from normfree.runner import Execution, begin, find_study
from tests.small_study import PRESET, without_drawing

STUDY = "relu-revival"
STEPS, SAVE_STEPS = 30, 5
RUNS = ("sm-ln-g", "sm-ln-r", "sm-g", "sm-r")


@pytest.fixture(scope="session")
def preset_path(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough for a worker to be killed between two checkpoints."""
    content: dict[str, Any] = {
        **PRESET,
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16},
        "data": {**PRESET["data"], "corpus": f"directory:{corpus_folder}"},  # type: ignore[dict-item]
        "recipe": {**PRESET["recipe"], "steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": 10},  # type: ignore[dict-item]
    }
    path = tmp_path_factory.mktemp("preset") / "short.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(scope="session")
def whole(preset_path: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's folder after a study in one process."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfree.report.saving.save_figure", without_drawing)
        with locked(folder):
            begun = begin(find_study(STUDY), folder, str(preset_path), lambda preset: preset)
            assert begun.run(Execution(Console(stderr=True), cache)) == {}
            begun.write()
    return folder


@pytest.fixture
def study(
    normfree: Callable[..., tuple[int, str, str]],
    preset_path: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """The command that trains the study in ``study``, with more arguments."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The fixture gives a folder that is gone with the test; workers need one that they find packed.
    (tmp_path / "cache").symlink_to(cache)

    def run(*arguments: object) -> tuple[int, str, str]:
        return normfree("study", STUDY, "--preset", preset_path, "--out", "study", *arguments)

    return run


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """The folder ``study`` with the first two runs finished: the others are enough to see workers at work."""
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(whole / "study.yaml", folder)
    for run in RUNS[:2]:
        shutil.copytree(whole / "runs" / run, folder / "runs" / run)
    return folder
