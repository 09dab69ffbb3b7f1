"""What a run takes before it begins: counts against the run itself, and time against a clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normfree.data import PackedData
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.progress import shown_on
from normfree.training import RunConfig, StudyProgress, train, training_plan
from normfree.training.recipe import Recipe
from normfree.training.training_plan import TrainingPlan, memory, planned_model, seconds_a_step, trial_model
from tests.test_progress import Clock, Log

CONFIG = NormfreeConfig(vocab_size=290, n_layer=2, n_head=2, n_embd=32, n_positions=64)


def recipe(**options: object) -> Recipe:
    return Recipe.model_validate({"steps": 10, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32"} | options)


def test_a_plan_counts_what_the_model_has() -> None:
    model = NormfreeForCausalLM(CONFIG)
    plan = TrainingPlan.of(recipe(), 16, model)
    assert plan == TrainingPlan.of(recipe(), 16, planned_model(CONFIG))
    assert (plan.steps, plan.tokens) == (10, 10 * 8 * 16)
    assert plan.parameters == plan.trained == sum(each.numel() for each in model.parameters())
    assert plan.operations == 6 * plan.parameters * plan.tokens
    assert str(plan).startswith("10 steps of 8 x 16 tokens = 1,280 tokens, ")
    # Weights, gradients and two moments in float32, and what a micro-batch adds to them.
    assert 16 * plan.parameters < plan.memory_bytes < 16 * plan.parameters + 4 * 16 * 3 * 32 * 17 * 4


def test_memory_falls_with_the_micro_batch_precision_checkpointing_and_frozen_weights() -> None:
    model = planned_model(CONFIG)
    whole = TrainingPlan.of(recipe(), 64, model).memory_bytes
    for option in ({"micro_batch_size": 1}, {"precision": "bf16"}, {"gradient_checkpointing": True}):
        assert TrainingPlan.of(recipe(**option), 64, model).memory_bytes < whole
    model.model.requires_grad_(False)
    frozen = TrainingPlan.of(recipe(), 64, model)
    assert frozen.trained < frozen.parameters
    assert f"({frozen.trained:,} trained)" in str(frozen)
    assert frozen.memory_bytes == whole - 12 * (frozen.parameters - frozen.trained)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(100, "1 MiB"), (120 * 2**20, "120 MiB"), (2**30, "1.0 GiB"), (2.34 * 2**30, "2.3 GiB")]
)
def test_memory_in_words(n_bytes: float, text: str) -> None:
    assert memory(n_bytes) == text


def test_a_trial_counts_all_micro_batches_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trial_model(CONFIG).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clock = iter([0.0, 9.0])  # one trial of 9 s, too long to be repeated
    monkeypatch.setattr("normfree.timing.time.perf_counter", lambda: next(clock))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert seconds_a_step(recipe(), 16, model) == 9.0 * 2  # of 8 sequences, 4 at a time
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_short_trial_is_repeated_warm_and_a_few_sequences_are_enough_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 4.0, 10.0, 11.0])
    monkeypatch.setattr("normfree.timing.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(training_plan, "CPU_TRIAL_TOKENS", 32)
    assert seconds_a_step(recipe(), 16, trial_model(CONFIG)) == 1.0 * 8 / 2


def test_training_says_its_plan_once_and_the_time_from_its_first_steps(
    tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path: Path
) -> None:
    log, clock, run = Log(), Clock(), tiny_run()
    n_tokens = run.recipe.n_tokens(run.data.sequence_length)
    with shown_on(log.display), StudyProgress(2 * n_tokens, "two runs", clock=clock) as progress:
        shown = progress.run("first", n_tokens)
        end_step = shown.end_step

        def slowly(state: object) -> None:
            clock.now += 7
            end_step(state)  # type: ignore[arg-type]

        shown.end_step = slowly  # type: ignore[method-assign,assignment]
        train(run, data, tmp_path / "first", callbacks=(shown,))
        train(
            run.model_copy(update={"seed": 1}), data, tmp_path / "second", callbacks=(progress.run("second", n_tokens),)
        )
    lines = log.file.getvalue().splitlines()
    steps = run.recipe.n_steps(run.data.sequence_length)
    (plan,) = [line for line in lines if " parameters, about " in line]
    assert plan.startswith(f"first: {steps} steps of {run.recipe.batch_size} x {run.data.sequence_length} tokens")
    per_step = n_tokens / steps
    # The first step is left out: two steps of 7 s, and all but three of both runs are left.
    left = (2 * steps - 3) * 7
    (estimate,) = [line for line in lines if "in the first steps" in line]
    assert estimate.startswith(f"two runs: {per_step / 7:,.0f} tokens a second in the first steps, about ")
    assert estimate.endswith(f"{left // 60} min {left % 60:02d} s for all" if left >= 60 else f"{left} s for all")


def test_a_run_that_resumes_is_estimated_by_what_is_left() -> None:
    log, clock = Log(), Clock()
    with shown_on(log.display), StudyProgress(1000, "run", clock=clock) as progress:
        progress.skip(900)
        for _ in range(3):
            clock.now += 10
            progress.advance(10)
    assert "1 tokens a second in the first steps, about 1 min 20 s for all" in log.file.getvalue()
