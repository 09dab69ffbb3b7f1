"""Several processes train the run that one process trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from normfree.training.checkpoint import restore_random_numbers
from normfree.training.run_folder import last_checkpoint
from tests.forked import normfree
from tests.nightly import NIGHTLY

from .launch import together
from .runs import OF_THE_CLOCK, assert_same_run, measured

Command = Callable[..., tuple[object, ...]]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_run_does_not_depend_on_the_number_of_processes(
    alone: Path, command: Command, tmp_path: Path, sharding: str, n: int
) -> None:
    ended = together(n, normfree(*command("run", sharding=sharding), "--json"), tmp_path)
    assert ended.codes == [0] * n, ended.output
    differences = assert_same_run(tmp_path / "run", alone)
    if NIGHTLY:
        print(f"\n{n} processes, sharding {sharding}: largest differences {differences}")
    # One of them speaks: standard output has the result, once, and standard error the evaluations.
    assert ended.outputs[1:] == [""] * (n - 1)
    assert ended.outputs[0].count('"eval_loss"') == 1
    losses = measured(tmp_path / "run", "sequence_losses")
    assert losses["sequence"].tolist() == list(range(9))
    # The files of a checkpoint are those of one process, but for the states of the random numbers.
    ours, theirs = (last_checkpoint(each) for each in (tmp_path / "run", alone))
    assert ours is not None
    assert theirs is not None
    names = {each.name for each in theirs.iterdir()} - {"rng_state.pth"}
    assert {each.name for each in ours.iterdir()} == names | {f"rng_state_{rank}.pth" for rank in range(n)}
    assert load_file(ours / "model.safetensors").keys() == load_file(theirs / "model.safetensors").keys()
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_that_of_one_process(command: Command, tmp_path: Path, precision: str) -> None:
    """A sharded model's residual stream and norms are not rounded to half precision, as FSDP's own policy would."""
    options = {"steps": 4, "precision": precision}
    assert together(1, normfree(*command("alone", **options)), tmp_path).codes == [0]
    ended = together(2, normfree(*command("run", **options, sharding="full")), tmp_path)
    assert ended.codes == [0, 0], ended.output
    assert_same_run(tmp_path / "run", tmp_path / "alone", tolerance=1e-3)


def test_a_stopped_run_of_as_many_processes_ends_as_the_whole_one(command: Command, tmp_path: Path) -> None:
    """Bit for bit, dropout included, in the middle of the second epoch."""
    options = {"model": {"embedding_dropout": 0.3}, "steps": 10, "save_steps": 8, "sharding": "full"}
    assert together(2, normfree(*command("run", **options)), tmp_path).codes == [0, 0]
    whole = measured(tmp_path / "run", "metrics")
    weights = (tmp_path / "run" / "checkpoint-10" / "model.safetensors").read_bytes()
    # As if it had been killed just before its last checkpoint.
    (tmp_path / "run" / "results.csv").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    assert together(2, normfree(*command("run", **options)), tmp_path).codes == [0, 0]
    kept, again = (
        each[each["name"] != OF_THE_CLOCK].drop(columns="wall_seconds").reset_index(drop=True)
        for each in (whole, measured(tmp_path / "run", "metrics"))
    )
    pd.testing.assert_frame_equal(kept, again, check_exact=True)
    assert (tmp_path / "run" / "checkpoint-10" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("step", [0, 4])
def test_each_process_has_random_numbers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Also where a checkpoint was written by fewer processes, and has no state for this one."""
    drawn = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        restore_random_numbers(tmp_path if step else None, seed=3, step=step)
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3


def test_a_single_process_goes_on_with_the_random_numbers_it_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(()).item()
    torch.manual_seed(0)
    restore_random_numbers(None, seed=3, step=0)
    assert torch.rand(()).item() == expected
    # A checkpoint of several processes has no state for one.
    restore_random_numbers(tmp_path, seed=3, step=4)
    assert torch.rand(()).item() != expected
