"""When a removal has diverged, what is blamed, and what follows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2LMHeadModel

from normfree import from_hf
from normfree.data import prepare_data
from normfree.errors import InputError
from normfree.removal import finetuning, remove
from normfree.removal.finetuning import (
    DivergedError,
    RemovalDivergedError,
    RemoveNorms,
    remove_by_finetuning,
)
from normfree.removal.layout import REMOVAL_FILE
from normfree.removal.midway import Midway
from normfree.removal.schedule import (
    Removal,
    RemovalSchedule,
    automatic_schedule,
)
from normfree.training import RunState
from normfree.training.objectives import CROSS_ENTROPY
from normfree.training.run_folder import checkpoints, step_of

from .models import scheduled, stock, tokens
from .small_removals import STEPS, corpus, gpt2, run_from

__all__ = ["corpus", "gpt2"]


def test_a_removal_that_diverges_goes_back_and_waits_longer(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tolerance below zero the first removal is taken for a jump, until it is raised again."""
    run = run_from(str(gpt2), corpus, steps=40)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = automatic_schedule(3, 40)
    jumps = iter([-100.0])
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    back = finetuning._go_back

    def go_back(folder: Path, wanted: int, latest: int) -> int:
        finetuning.MAX_JUMP = next(jumps) + 200
        return back(folder, wanted, latest)

    monkeypatch.setattr(finetuning, "_go_back", go_back)
    remove_by_finetuning(run, data, tmp_path / "run", schedule, config)
    (stretch,) = json.loads((tmp_path / "run" / REMOVAL_FILE).read_text())["stretches"]
    first = schedule.removals(config)[0].step
    assert stretch["step"] <= first
    assert "after the removal of ffn of layer 0" in stretch["jump"]
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    losses = metrics[metrics["name"] == "cross_entropy_nats"]
    assert losses["step"].tolist() == list(range(1, 41))


def watch(
    losses: list[float],
    *,
    removals: tuple[int, ...] = (12, 14),
    history: list[float] | None = None,
    max_steps: int = 0,
) -> int | None:
    """The step of the removal that a run of these losses, after those of its history, is said to have diverged by."""

    class Gone:
        gone: ClassVar[list[Removal]] = []

        schedule = RemovalSchedule(stages=())

        def apply(self, removal: Removal) -> None:
            pass

        def begin_step(self, step: int) -> None:
            pass

        def finish(self) -> None:
            pass

    midway: Any = Gone()
    callback = RemoveNorms(midway, [Removal(step, "ffn", layer) for layer, step in enumerate(removals)])
    earlier = list(enumerate(history or [], start=1))

    class Records:
        def metric(self, name: str) -> list[tuple[int, float]]:
            assert name == CROSS_ENTROPY
            return earlier

    records: Any = Records()
    state = RunState(midway, records, n_steps=max_steps, step=len(earlier))
    try:
        callback.begin(state)
        for loss in losses:
            state.step += 1
            callback.log(state, {CROSS_ENTROPY: loss})
        callback.finish(state)
    except DivergedError as jump:
        removal = jump.removal
        assert removal is not None
        return removal.step
    return None


def test_one_bad_batch_is_no_divergence() -> None:
    assert watch([2.0] * 13 + [2.5, 70.0, 2.2, 3.1, 3.2, 3.3, 3.4, 2.9]) is None, "not for five steps in a row"


@pytest.mark.parametrize("seen", [0, 8, 15, 16])
def test_a_jump_that_stays_is_blamed_on_the_removal_it_began_with(seen: int) -> None:
    """Wherever the run was stopped and resumed."""
    losses = [2.0] * 13 + [3.1] * 5
    assert watch(losses[seen:], history=losses[:seen]) == 12
    assert watch([2.0] * 14 + [3.1] * 5) == 14


def test_a_jump_at_the_end_and_a_nan_are_divergence_at_once() -> None:
    assert watch([2.0] * 14 + [3.1], max_steps=15) == 14
    assert watch([2.0] * 14 + [3.1], max_steps=16) is None, "stopped before its end"
    assert watch([2.0] * 13 + [math.nan, 2.0, 2.0]) == 12
    assert watch([2.0] * 13 + [math.inf, 2.0, 2.0]) == 12
    assert watch([2.0, 2.0], removals=(0,)) == 0, "nothing to compare with"


def test_stds_that_are_not_finite_are_divergence() -> None:
    """The message names the norm; what made them so began with a removal, even if no loss has said so yet."""
    midway = Midway(from_hf(stock("gpt2")), scheduled())
    removals = [Removal(3, "ffn", 0), Removal(5, "attention_qk", 1)]
    callback = RemoveNorms(midway, removals)
    records: Any = None
    run = RunState(midway.model, records, n_steps=9, step=2)
    midway.model.train()(tokens())
    run.step = 3
    callback.end_step(run)
    callback.begin_step(run)
    with torch.no_grad():
        midway.model.model.blocks[1].attention.o_proj.weight[0] = math.inf
    midway.model(tokens())
    run.step = 4
    where = "before the ffn norm of layer 1 at step 4 after the removal of ffn of layer 0"
    with pytest.raises(DivergedError, match=f"a std that is not finite {where}") as diverged:
        callback.end_step(run)
    assert diverged.value.removal == removals[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_norm_that_is_gone_is_watched_too(value: float, is_gone: bool) -> None:
    midway = Midway(from_hf(stock("llama")), scheduled())
    midway.model.train()(tokens())
    if is_gone:
        midway.apply(Removal(3, "final", None))
    with torch.no_grad():
        midway.model.model.blocks[-1].ffn.down_proj.weight[0] = value
    midway.begin_step(4)
    assert midway.overflow() is None, "nothing has been seen in this step"
    midway.model(tokens())
    midway.model(tokens()[:1])
    assert midway.overflow() == "the final norm"


def test_divergence_before_any_removal_is_no_early_schedule(gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    run = run_from(str(gpt2), corpus, learning_rate=1e30, warmup_ratio=0.0)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = automatic_schedule(3, STEPS).model_copy(update={"massive_steps": 3})
    with pytest.raises(RemovalDivergedError, match=r"before any removal; lower recipe.learning_rate") as error:
        remove_by_finetuning(run, data, tmp_path / "run", schedule, config)
    assert "begin" not in str(error.value)


def test_a_removal_that_never_settles_is_bad_input(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    with pytest.raises(InputError, match=r"last removal \(first_token\) is at step \d+, and the budget ends after 16"):
        remove_by_finetuning(run, data, tmp_path / "run", automatic_schedule(3, STEPS), config)


def test_a_removal_that_diverged_for_good_leaves_a_table(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    with pytest.raises(RemovalDivergedError, match="after a jump of the loss"):
        remove(run, data, tmp_path / "out", None, vanilla=False)
    table = pd.read_csv(tmp_path / "out" / "removal.csv").set_index("variant")
    assert np.isfinite(table["eval_loss"]["original"])
    assert np.isnan(table.loc["norm-free", ["eval_loss", "eval_ppl", "delta_loss"]].to_numpy(dtype=float)).all()
    assert not (tmp_path / "out" / "norm-free").exists()


@pytest.mark.parametrize(("needed", "left", "factor"), [(100, 500, 2.0), (100, 150, 1.5), (100, 101, 1.2), (0, 5, 2.0)])
def test_a_schedule_is_stretched_as_far_as_the_budget_goes(needed: int, left: int, factor: float) -> None:
    assert finetuning._stretch(needed, left) == factor


@pytest.mark.parametrize(
    ("steps", "wanted", "step", "left"),
    [
        ((20, 40), 30, 20, [20]),
        ((20, 40), 10, 20, [20]),  # before the removal at 25, though ramps of earlier ones were not over
        ((30, 40), 10, 0, []),
        ((), 10, 0, []),
    ],
)
def test_a_run_goes_back_to_before_the_ramps_or_at_least_before_the_removal(
    steps: tuple[int, ...], wanted: int, step: int, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        finetuning, "last_checkpoint", lambda folder: max(checkpoints(folder), key=step_of, default=None)
    )
    for each in steps:
        (tmp_path / f"checkpoint-{each}").mkdir()
    assert finetuning._go_back(tmp_path, wanted, max(25, wanted)) == step
    assert [step_of(each) for each in checkpoints(tmp_path)] == left
