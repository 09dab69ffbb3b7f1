"""A process killed at any moment, and started again with the same command, ends as one that was never killed."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.data.test_pairs import PAIRS, write
from tests.forked import normfree
from tests.nightly import NIGHTLY

from .crash import Kill, in_child, killed_again_and_again, random_kills

KILLS_IN_A_CHAIN = 4
TRAIN_KILLS, STUDY_KILLS, REMOVAL_KILLS, FINETUNE_KILLS = (160, 60, 60, 40) if NIGHTLY else (17, 4, 7, 4)
OF_THE_CLOCK = ("tokens_per_second",)


def state_of(folder: Path) -> dict[str, Any]:
    """All that a command has left in ``folder``, but for readings of the clock."""
    state: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if path.name in ("metrics.parquet",):
            metrics = pd.read_parquet(path)
            repeated = metrics[~metrics["name"].isin(OF_THE_CLOCK)].drop(columns="wall_seconds")
            state[name] = repeated.to_csv(index=False)
            assert metrics["wall_seconds"].is_monotonic_increasing
            assert not metrics.duplicated(["step", "name"]).any()
        elif path.suffix == ".parquet":
            state[name] = pd.read_parquet(path).to_csv(index=False)
        elif path.suffix in (".npy", ".csv", ".safetensors", ".pt", ".pth"):
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            state[name] = "there"
    return state


def prove(
    job: Callable[[Path], Callable[[], None]], folder: Path, n_kills: int, chosen: tuple[tuple[Kill, ...], ...] = ()
) -> None:
    """Kills ``job`` in a chain of ``chosen`` kills and in chains of random ones, and compares what each leaves."""
    (folder / "whole").mkdir()
    start = time.monotonic()
    whole = in_child(job(folder / "whole"), folder / "whole")
    seconds = time.monotonic() - start
    assert whole.code == 0, whole.output
    expected = state_of(folder / "whole")
    done, chain = 0, 0
    while done < n_kills:
        stopped = folder / f"stopped-{chain}"
        stopped.mkdir()
        kills = random_kills(random.Random(chain), whole, seconds, min(KILLS_IN_A_CHAIN, n_kills - done))
        *killed, last = killed_again_and_again(job(stopped), stopped, chosen[chain] if chain < len(chosen) else kills)
        assert all(each.code == -signal.SIGKILL for each in killed)
        assert last.code == 0, last.output
        assert chain >= len(chosen) or len(killed) == len(chosen[chain])
        found = state_of(stopped)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == [], chain
        done, chain = done + len(killed), chain + 1
    print(f"\n{done} kills in {chain} runs of {whole.changes} changes to files: all ended like one never killed")


IN_A_RUN = (
    Kill(before=("open", "train.npy")),
    Kill(before=("open", "data.json")),
    Kill(before=("os.rename", "config.yaml")),
    Kill(before=("open", ".checkpoint-2", "progress")),
    Kill(before=("os.rename", ".checkpoint-2", "run/checkpoint-2")),
    Kill(before=("os.rename", "metrics")),
    Kill(before=("os.rmdir", "run/checkpoint-2")),
    Kill(before=("os.rmdir", "run/checkpoint-8")),
    Kill(before=("os.rename", "sequence_losses")),
    Kill(before=("os.rename", "results.csv")),
    Kill(before=("os.remove", "run/.lock.json")),
)
"""While tokens are packed, a checkpoint is written, put into its place or taken away, telemetry is flushed, between the
last checkpoint and the result, and before the finished run is let go."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"] if NIGHTLY else ["fp32"])
def test_a_run(train_command: Callable[[Path], Any], run_file: Path, tmp_path: Path, precision: str) -> None:
    content = yaml.safe_load(run_file.read_text())
    content["recipe"]["precision"] = precision
    run_file.write_text(yaml.safe_dump(content))
    prove(lambda folder: normfree(*train_command(folder)), tmp_path, TRAIN_KILLS, (IN_A_RUN,))


def test_a_study(run_content: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**run_content["recipe"], "steps": 3}
    preset = {"description": "For tests.", "model_name": "tiny", "recipe": recipe, "data": run_content["data"]}
    preset["model"] = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(preset))

    def job(folder: Path) -> Any:
        out = ("--out", folder / "study", "--cache-dir", folder / "cache")
        return normfree("study", "relu-revival", "--preset", path, *out)

    let_go = Kill(before=("os.remove", "runs/sm-ln-r/seed-0/.lock.json"))
    prove(job, tmp_path, STUDY_KILLS, ((let_go,),))


@pytest.fixture
def base(train_command: Callable[[Path], Any], tmp_path: Path) -> Path:
    """A trained run with norms to begin from, outside the folders that kills are counted in."""
    folder = tmp_path / "base"
    folder.mkdir()
    trained = in_child(normfree(*train_command(folder)), folder)
    assert trained.code == 0, trained.output
    return folder / "run"


IN_A_REMOVAL = (
    Kill(before=("os.rename", "vanilla/checkpoint-16")),
    Kill(before=("os.rename", "removal/checkpoint-12")),
    Kill(before=("os.rename", "removal/checkpoint-24")),
    Kill(before=("os.rename", "removal/removal.json")),
    Kill(before=("os.rename", "out/norm-free")),
    Kill(before=("os.rename", "removal.csv")),
)
"""While checkpoints of the control and of the removal are put into their places, the removals are written down, a model
is exported, and before the table."""


def test_a_removal_of_norms(base: Path, tmp_path: Path) -> None:
    size = ("--steps", 24, "--set", "recipe.save_steps=4", "--set", "recipe.eval_steps=12")

    def job(folder: Path) -> Any:
        return normfree("remove-norm", base, *size, "--out", folder / "out", "--cache-dir", folder / "cache")

    prove(job, tmp_path, REMOVAL_KILLS, (IN_A_REMOVAL,))


@pytest.mark.parametrize("lora", [(), ("--lora", 2)] if NIGHTLY else [("--lora", 2)])
def test_a_finetuning_on_pairs(base: Path, tmp_path: Path, lora: tuple[object, ...]) -> None:
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    size = ("--steps", 9, "--set", "data.eval_fraction=0.2", "--set", "recipe.save_steps=2")

    def job(folder: Path) -> Any:
        start = ("finetune", base, "--corpus", f"pairs:{pairs}", *size, *lora)
        return normfree(*start, "--out", folder / "run", "--cache-dir", folder / "cache")

    prove(job, tmp_path, FINETUNE_KILLS)
