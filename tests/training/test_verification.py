"""``normfree verify`` finds every kind of harm, names it, and says nothing about a run that is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

from normfree.data import PackedData
from normfree.training import RunConfig, train
from normfree.training.run_folder import write_manifest
from normfree.training.verification import verify_run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny_run(steps=7, telemetry_steps=2, logging_steps=2)
    return train(run, data, tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_whole_runs_hold(
    run: Path, data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path, precision: str
) -> None:
    found = verify_run(run, data.folder.parent)
    assert (found.problems, found.unchecked) == ([], [])
    train(tiny_run(precision=precision), data, tmp_path / "half")
    found = verify_run(tmp_path / "half", data.folder.parent)
    assert (found.problems, found.unchecked) == ([], [])


def edit_row(run: Path, **changes: Any) -> None:
    table = pd.read_csv(run / "results.csv")
    table.assign(**changes).to_csv(run / "results.csv", index=False)


def edit_table(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(path)).to_parquet(path, index=False)


def other_weights(run: Path) -> None:
    path = run / "checkpoint-7" / "model.safetensors"
    state = load_file(path)
    state["model.blocks.0.ffn.up_proj.weight"] += 0.5
    save_file(state, path, metadata={"format": "pt"})


def other_weights_under_a_new_hash(run: Path) -> None:
    other_weights(run)
    manifest = json.loads((run / "checkpoint-7" / "checkpoint.json").read_text())
    (run / "checkpoint-7" / "checkpoint.json").unlink()
    write_manifest(run / "checkpoint-7", manifest["run"])


def without(name: str, step: int) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table[(table["name"] != name) | (table["step"] != step)]


def nan_loss(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(value=table["value"].where(table["name"] != "eval_loss", np.nan))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (other_weights, "checkpoint-7: model.safetensors is not as it was written: its SHA-256 differs"),
        (other_weights_under_a_new_hash, "checkpoint-7 has another loss than was stored"),
        (lambda run: shutil.rmtree(run / "checkpoint-7"), "there is no whole checkpoint of the last step, 7"),
        (lambda run: edit_row(run, eval_loss=1.0), "eval_loss is 1.0, and the mean of the sequences' losses"),
        (lambda run: edit_row(run, eval_ppl=2.0), "eval_ppl is 2.0, and exp(eval_loss)"),
        (lambda run: edit_row(run, seed=5), "results.csv: seed is 5, and 0 by the configuration"),
        (lambda run: edit_row(run, steps=8), "results.csv: steps is 8, and 7 by the configuration"),
        (lambda run: edit_row(run, status="fine"), "unknown status 'fine'"),
        (lambda run: (run / "results.csv").write_text(""), "results.csv cannot be read"),
        (
            lambda run: edit_table(run / "sequence_losses.parquet", lambda table: table.iloc[:-1]),
            "eval_sequences is 32, and 31 by the configuration and the losses",
        ),
        (
            lambda run: edit_table(run / "metrics.parquet", without("train_loss", 4)),
            "metrics.parquet: train_loss is missing at 1 steps, 4 first",
        ),
        (
            lambda run: edit_table(run / "metrics.parquet", lambda table: pd.concat([table, table.iloc[:3]])),
            "metrics.parquet: 3 rows are there twice",
        ),
        (lambda run: edit_table(run / "metrics.parquet", nan_loss), "3 values of eval_loss are not finite"),
        (
            lambda run: edit_table(run / "layers.parquet", without("entropy_nats", 6)),
            "layers.parquet: entropy_nats is missing at 1 steps, 6 first",
        ),
        (lambda run: (run / "layers.parquet").write_bytes(b"PAR1"), "layers.parquet cannot be read"),
    ],
)
def test_harm_is_found(run: Path, data: PackedData, harm: Callable[[Path], object], says: str) -> None:
    harm(run)
    found = verify_run(run, data.folder.parent)
    assert any(says in problem for problem in found.problems), found.problems
    assert all("\n" not in problem for problem in found.problems)


def test_the_command_tells_with_its_exit_code(normfree: Command, run: Path, tmp_path: Path) -> None:
    assert normfree("verify", run, "--no-evaluate") == (0, "1 of 1 runs hold\n", "")
    shutil.copytree(run, tmp_path / "runs" / "bad")
    edit_row(tmp_path / "runs" / "bad", seed=5)
    shutil.copytree(run, tmp_path / "runs" / "good")
    code, out, _ = normfree("verify", tmp_path / "runs", "--no-evaluate", "--json")
    assert code == 1
    answer = json.loads(out)
    assert not answer["holds"]
    assert [each["holds"] for each in answer["runs"]] == [False, True]
    code, out, err = normfree("verify", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "holds no finished run" in err


def test_a_run_whose_tokens_are_gone_cannot_be_measured_again(normfree: Command, run: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["provenance"]["corpus_fingerprint"] = "0123456789abcdef"
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    code, _, err = normfree("verify", run, "--cache-dir", tmp_path / "cache")
    assert code == 2
    assert "has changed since they were made" in err
