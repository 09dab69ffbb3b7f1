"""Stopped and taken up again by another number of processes, sharded or not, a run is still the same one."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from normfree import NormfreeForCausalLM
from normfree.data import DataConfig, prepare_data
from normfree.locks import locked
from normfree.training.loop import Training
from normfree.training.order import load_rewinds
from normfree.training.run_folder import checkpoints, last_checkpoint
from tests.forked import normfree

from .launch import together
from .runs import assert_same_run, rows, trained_on

Command = Callable[..., tuple[object, ...]]
CLIP = Training.clip


class SignalAt:
    """Sends a signal to the process of one rank in the middle of a step."""

    def __init__(self, step: int, rank: int, told: signal.Signals) -> None:
        self.step = step
        self.rank = rank
        self.signal = told

    def send(self, training: Training) -> Any:
        if training.state.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            os.kill(os.getpid(), self.signal)
        return CLIP(training)


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, rank: int, told: signal.Signals) -> None:
    """Telemetry's probes stand on the model in every second step; the signal comes between forward and update."""
    at = SignalAt(step, rank, told)
    monkeypatch.setattr(Training, "clip", lambda training: at.send(training))


@pytest.mark.parametrize(
    "stages",
    [
        [(4, "full"), (2, "full"), (1, "none")],
        [(1, "none"), (2, "none"), (2, "full")],
        [(2, "full"), (1, "full"), (2, "none")],
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    alone: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[tuple[int, str]]
) -> None:
    """Stopped by SIGTERM to the last of them, which all heed at the same step."""
    for number, (n, sharding) in enumerate(stages):
        job = normfree(*command("run", sharding=sharding))
        if number == len(stages) - 1:
            ended = together(n, job, tmp_path)
            assert ended.codes == [0] * n, ended.output
            break
        step = (5, 8)[number]
        with monkeypatch.context() as patch:
            signalled(patch, step, n - 1, signal.SIGTERM)
            ended = together(n, job, tmp_path)
        assert ended.codes == [143] * n, ended.output
        assert "Traceback" not in ended.output
        assert ended.output.count("stopped by SIGTERM; the same command resumes from the last checkpoint: ") == 1
        checkpoint = last_checkpoint(tmp_path / "run")
        assert checkpoint is not None
        assert checkpoint.name == f"checkpoint-{step + 1}"
    differences = assert_same_run(tmp_path / "run", alone)
    assert differences["grad_norm"] < 1e-4


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(
    alone: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str
) -> None:
    job = normfree(*command("run", sharding=sharding))
    with monkeypatch.context() as patch:
        signalled(patch, 6, 1, signal.SIGKILL)
        ended = together(2, job, tmp_path)
    assert ended.codes == [1, -signal.SIGKILL], ended.output
    last = ended.outputs[0].strip().splitlines()[-1]
    assert last == (
        "normfree: another of the 2 processes of this run is gone; the same command resumes from the last checkpoint"
    )
    assert [each.name for each in checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert together(2, job, tmp_path).codes == [0, 0]
    assert_same_run(tmp_path / "run", alone)


def test_a_batch_that_does_not_divide_is_refused(command: Command, tmp_path: Path) -> None:
    ended = together(3, normfree(*command("run")), tmp_path)
    assert ended.codes == [2, 2, 2]
    assert [each.strip() for each in ended.outputs] == [
        "normfree: recipe.batch_size (8) does not divide over 3 processes; start a number of them that divides it, or "
        "change it",
        "",
        "",
    ]
    assert not (tmp_path / "run").exists()


def test_all_processes_are_refused_where_another_run_has_the_folder(command: Command, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        ended = together(2, normfree(*command("run")), tmp_path)
    assert ended.codes == [2, 2]
    message, nothing = (each.strip() for each in ended.outputs)
    assert message.startswith(f"normfree: {tmp_path / 'run'} is in use by process {os.getpid()} on ")
    assert (message.count("\n"), nothing) == (0, "")
    assert not (tmp_path / "run").exists()


def poison(monkeypatch: pytest.MonkeyPatch, sequences: list[list[int]]) -> None:
    """Makes the loss NaN in micro-batches that begin with one of ``sequences``."""
    plain = NormfreeForCausalLM.forward

    def forward(self: Any, input_ids: Any = None, *arguments: Any, **options: Any) -> Any:
        outputs = plain(self, input_ids, *arguments, **options)
        if self.training and input_ids[0].tolist() in sequences:
            outputs.loss = outputs.loss * math.nan
        return outputs

    monkeypatch.setattr(NormfreeForCausalLM, "forward", forward)


@pytest.fixture
def second_micro_batch(content: dict[str, Any], cache: Path) -> list[int]:
    """The first sequence of the second micro-batch of step 6: of two processes, the second has it alone."""
    data = prepare_data(DataConfig.model_validate(content["data"]), cache)
    order = list(SeedableRandomSampler(data.train, data_seed=content["seed"]))
    tokens: list[int] = data.train[order[5 * 8 + 2]]["input_ids"].tolist()
    return tokens


@pytest.mark.parametrize(("sharding", "policy"), [("none", "halt"), ("full", "rewind")])
def test_a_nan_that_one_process_sees_is_a_nan_for_all(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    second_micro_batch: list[int],
    sharding: str,
    policy: str,
) -> None:
    poison(monkeypatch, [second_micro_batch])
    ended = {
        n: together(n, normfree(*command(f"of-{n}", on_nonfinite=policy, steps=8, sharding=sharding)), tmp_path)
        for n in (1, 2)
    }
    if policy == "halt":
        assert (ended[1].codes, ended[2].codes) == ([1], [1, 1])
        message = "step 6: the loss is not finite; stopped, as recipe.on_nonfinite asks for; checkpoint-4 is the last"
        assert ended[2].output.count(message) == 1
        assert trained_on(tmp_path / "of-2").tolist() == [1, 2, 3, 4, 5]
    else:
        assert (ended[1].codes, ended[2].codes) == ([0], [0, 0]), ended[2].output
        assert load_rewinds(tmp_path / "of-2") == load_rewinds(tmp_path / "of-1") != []
        assert ended[2].output.count("back to step 4, without the 16 sequences that led there") == 1
        assert_same_run(tmp_path / "of-2", tmp_path / "of-1")


def test_nan_counts_are_sums_and_nan_means_are_nan(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token's embedding is NaN: how much of a batch that spoils depends on where in it the token stands."""
    from normfree.training import loop

    plain = loop._model

    def with_nan(*arguments: Any) -> Any:
        model = plain(*arguments)
        with torch.no_grad():
            model.model.embed_tokens.weight[265] = math.nan
        return model

    monkeypatch.setattr(loop, "_model", with_nan)
    for n in (1, 2):
        options = {"steps": 1, "telemetry_steps": 1, "sharding": "full", "model": {"tie_word_embeddings": False}}
        ended = together(n, normfree(*command(f"of-{n}", **options)), tmp_path)
        assert ended.codes == [0] * n, ended.output
    ours, theirs = rows(tmp_path / "of-2"), rows(tmp_path / "of-1")
    pd.testing.assert_series_equal(ours, theirs, atol=1e-6)
    counts = ours["residual_nan_count"]
    assert (counts > 0).all()
    assert (counts < 8 * 16 * 16).all()  # not everything: only what the token's position and later ones see
    assert ours["scores_nan_count"].min() > 0
    assert ours["entropy_nats"].isna().any()
    assert (pd.read_csv(tmp_path / "of-2" / "results.csv")["status"] == "diverged").all()
