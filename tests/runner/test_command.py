"""The command of a study in its report: every option that changes what ran or how is in it."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from normfree.cli import app
from normfree.errors import RunFailedError
from normfree.runner import Execution
from normfree.runner.execution import study_command
from normfree.runner.opening import OpenCollection, OpenStudy
from tests.forked import ForkedWorker

Command = Callable[..., tuple[int, str, str]]
GIVEN: dict[str, list[list[str]]] = {
    "preset": [["--preset", "smoke"]],
    "out": [["--out", "else where"]],
    "seeds": [["--seeds", "2,0"]],
    "tokens": [["--tokens", "8192"]],
    "steps": [["--steps", "3"]],
    "corpus": [["--corpus", "installed-python"]],
    "tokenizer": [["--tokenizer", "train"]],
    "set_": [["--set", "model.norm_eps=1.0e-05", "--set", "recipe.probes=[qk_logit_max]", "--set", "model_name=it's"]],
    "only": [["--only", "SM+R", "--only", "SM+LN+R"]],
    "tune_lr": [["--tune-lr"]],
    "all_": [["--all"]],
    "executor": [["--executor", "slurm"], ["--executor", "ray"]],
    "workers": [["--workers", "3"], ["--executor", "slurm", "--workers", "3"]],
    "executor_set": [
        ["--workers", "1", "--executor-set", "cpus=1", "--executor-set", "gpus=0.25"],
        ["--executor", "slurm", "--executor-set", "setup=module load 'cuda'", "--executor-set", "sbatch.nice=10"],
    ],
    "retries": [["--workers", "1", "--retries", "5"]],
    "device": [["--device", "cpu"], ["--workers", "2", "--device", "cpu"]],
    "cache_dir": [["--cache-dir", "tokens"]],
}
"""What a test gives of each option; with others where it means nothing alone."""
PRINTING = {"list_", "plan", "json_"}
"""Options that change what is printed: no run is trained, or none in another way."""
PARAMETERS = [each.name for each in typer.main.get_command(app).commands["study"].params]  # type: ignore[attr-defined]


class Asked:
    """What reaches the runs of a study, whose command ends there."""

    def __init__(self, opened: OpenStudy | OpenCollection, execution: Execution) -> None:
        self.command = execution.command
        self.what = {each.name: getattr(execution, each.name) for each in fields(execution)}
        del self.what["console"], self.what["command"]
        executor = self.what.pop("executor")
        self.what["executor"] = executor and (type(executor), executor.settings, executor.workers)
        self.what["studies"] = [(each.name, each.path, each.folder.preset) for each in opened.members]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], Asked]:
    """What a command asks for."""
    seen: list[Asked] = []

    def run(opened: OpenStudy | OpenCollection, execution: Execution) -> dict[str, str]:
        seen.append(Asked(opened, execution))
        raise RunFailedError("this is enough")

    monkeypatch.setattr(OpenStudy, "run", run)
    monkeypatch.setattr(OpenCollection, "run", run)
    monkeypatch.chdir(tmp_path)

    def ask(words: list[str]) -> Asked:
        with pytest.raises(RunFailedError, match="this is enough"):
            app(words, prog_name="normfree", standalone_mode=False)
        return seen.pop()

    return ask


def test_every_option_is_given_here_or_changes_what_is_printed() -> None:
    assert set(PARAMETERS) - {"name"} == GIVEN.keys() | PRINTING


@pytest.mark.parametrize("option", GIVEN)
def test_the_command_asks_for_the_same_again(asked: Callable[[list[str]], Asked], option: str) -> None:
    plain = asked(["study", "relu-revival"])
    for words in GIVEN[option]:
        first = asked(["study", "relu-revival", *words])
        assert first.command != plain.command
        program, *again = shlex.split(first.command)
        assert program == "normfree"
        second = asked(again)
        assert second.what == first.what
        assert second.command == first.command


def test_values_from_python_are_those_of_the_command(asked: Callable[[list[str]], Asked], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        **{"recipe.learning_rate": 1e-5, "data.corpus": tmp_path / "texts", "recipe.betas": (0.9, 0.95)},
        **{"model.norm": None, "model.activation": ["gelu", "relu"], "model_name": "yes", "recipe.steps": np.int64(4)},
    }
    command = study_command("relu-revival", "smoke", tmp_path, changes, Execution(None, tmp_path))  # type: ignore[arg-type]
    assert "\n" not in command
    sets = [words for words in shlex.split(command) if "=" in words]
    assert sets == [
        "recipe.learning_rate=1.0e-05",
        f"data.corpus={tmp_path / 'texts'}",
        "recipe.betas=[0.9, 0.95]",
        "model.norm=null",
        "model.activation=[gelu, relu]",
        "model_name='yes'",
        "recipe.steps='4'",
    ]


def commands_in(page: Path) -> list[str]:
    text = html.unescape(page.read_text(encoding="utf-8"))
    return re.findall(r"normfree study .*?(?=\n|<)", text)


def test_the_report_quotes_every_command_that_began_runs_and_no_other(
    normfree: Command, preset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfree.runner.executors.local.subprocess.Popen", ForkedWorker)
    base: tuple[object, ...] = ("study", "relu-revival", "--preset", preset_file, "--steps", 2, "--out", "study")
    part = (*base, "--only", "SM+R", "--workers", 1, "--executor-set", "cpus=1", "--retries", 0, "--device", "cpu")
    again = ((*base, "--only", "SM+R"), base, (*base, "--tune-lr", "--plan"), (*base, "--workers", 1))
    for arguments in (part, *again):
        code, out, err = normfree(*arguments)
        assert code == 0, out + err
    first, second = commands_in(tmp_path / "study" / "report.html")
    for words in ("--set recipe.steps=2", "--only SM+R", "--workers 1", "--executor-set cpus=1", "--retries 0"):
        assert f" {words} " in f"{first} "
    assert " --device cpu " in first
    assert f"--preset {preset_file} --out study --set recipe.steps=2" in second
    assert "--only" not in second
    assert "--workers" not in second
    assert normfree("report", "study")[0] == 0
    assert commands_in(tmp_path / "study" / "report.html") == [first, second]
    (tmp_path / "study" / "commands.yaml").write_text("commands: 3\n")
    code, _, err = normfree("report", "study")
    assert (code, err.count("\n")) == (2, 1)
    assert "commands.yaml is damaged" in err
