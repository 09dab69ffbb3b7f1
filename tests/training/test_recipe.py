from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.training import Recipe
from normfree.training.optimizer import adamw, learning_rates
from normfree.training.run_config import with_changes


def test_a_budget_in_tokens_is_whole_steps() -> None:
    recipe = Recipe(tokens=10_000, batch_size=8, micro_batch_size=4)
    assert recipe.n_steps(sequence_length=128) == 9  # 9 x 8 x 128 = 9,216
    assert recipe.n_tokens(sequence_length=128) == 9_216


def test_a_budget_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(InputError, match=r"recipe.tokens is 1000, less than one step of 8 sequences of 128"):
        Recipe(tokens=1000, batch_size=8, micro_batch_size=8).n_steps(128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"steps": 1, "tokens": 100}, "exactly one"),
        ({"steps": 1, "batch_size": 10, "micro_batch_size": 4}, "not a multiple"),
        ({"steps": 1, "learning_rate": 0.0}, "greater than 0"),
        ({"steps": 1, "learning_rte": 0.1}, "Extra inputs"),
        ({"steps": 1, "precision": "fp8"}, "fp32"),
        ({"steps": 1, "sharding": "half"}, "'none' or 'full'"),
    ],
)
def test_bad_recipes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(("batch", "micro"), [(4, 4), (512, 128), (130, 65), (131, 1), (96, 96), (256, 128)])
def test_a_batch_size_alone_is_enough(batch: int, micro: int) -> None:
    assert Recipe(steps=1, batch_size=batch).micro_batch_size == micro


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"recipe.batch_size": 4}, (4, 4)),
        ({"recipe.batch_size": 32}, (32, 8)),
        ({"recipe.batch_size": 12}, (12, 6)),
        ({"recipe.batch_size": 12, "recipe.micro_batch_size": 4}, (12, 4)),
        ({"recipe.micro_batch_size": 2}, (16, 2)),
    ],
)
def test_a_changed_batch_size_takes_the_micro_batch_along(changes: dict[str, int], sizes: tuple[int, int]) -> None:
    content = {"recipe": {"steps": 1, "batch_size": 16, "micro_batch_size": 8}}
    recipe = Recipe.model_validate(with_changes(content, changes)["recipe"])
    assert (recipe.batch_size, recipe.micro_batch_size) == sizes


def test_a_chosen_micro_batch_size_that_does_not_divide_is_refused() -> None:
    content = {"recipe": {"steps": 1, "batch_size": 16, "micro_batch_size": 8}}
    with pytest.raises(ValidationError, match="not a multiple"):
        Recipe.model_validate(with_changes(content, {"recipe.batch_size": 12, "recipe.micro_batch_size": 8})["recipe"])


def test_the_defaults_are_the_papers() -> None:
    recipe = Recipe(tokens=2_100_000_000, precision="bf16")
    assert recipe.n_steps(128) == 32_043
    assert recipe.n_warmup_steps(128) == 1_603  # 5 % of the steps, rounded up
    assert (recipe.device_batch_size, recipe.accumulation_steps) == (128, 4)
    optimizer = adamw(torch.nn.Linear(2, 2), recipe)
    assert {name: optimizer.defaults[name] for name in ("lr", "betas", "eps")} == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert (recipe.learning_rate_decay, recipe.max_grad_norm) == ("linear", 1.0)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"recipe.batch_size \(16\) does not divide over 3 processes"):
        Recipe(steps=1, batch_size=16, micro_batch_size=4, precision="fp32").check(16)


@pytest.mark.parametrize(
    ("n_processes", "device_batch_size", "accumulation"),
    [(1, 8, 12), (2, 8, 6), (4, 8, 3), (8, 6, 2), (16, 6, 1), (32, 3, 1), (96, 1, 1)],
)
def test_the_batch_stays_the_same_for_any_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, n_processes: int, device_batch_size: int, accumulation: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(n_processes))
    recipe = Recipe(steps=1, batch_size=96, micro_batch_size=8, precision="fp32")
    recipe.check(16)
    assert (recipe.device_batch_size, recipe.accumulation_steps) == (device_batch_size, accumulation)
    assert n_processes * device_batch_size * accumulation == 96


@pytest.mark.parametrize("decay_slopes", [True, False])
def test_slopes_are_decayed_like_weights_unless_the_recipe_says_no(decay_slopes: bool) -> None:
    config = NormfreeConfig(
        vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_positions=8, norm="none", activation="learnable_leaky_relu"
    )
    model = NormfreeForCausalLM(config)
    groups = adamw(model, Recipe(steps=1, precision="fp32", decay_slopes=decay_slopes)).param_groups
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    slopes = [block.ffn.activation.negative_slope for block in model.model.blocks]
    assert [decay_of[id(slope)] for slope in slopes] == [0.1 if decay_slopes else 0.0] * 2
    assert decay_of[id(model.model.blocks[0].ffn.up_proj.weight)] == 0.1


def decayed_names(model: NormfreeForCausalLM) -> set[str]:
    decayed = {id(each) for each in adamw(model, Recipe(steps=1, precision="fp32")).param_groups[0]["params"]}
    return {name for name, each in model.named_parameters(remove_duplicate=False) if id(each) in decayed}


def test_norms_and_biases_are_not_decayed() -> None:
    model = NormfreeForCausalLM(NormfreeConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, n_positions=8))
    projections = [f"attention.{name}_proj" for name in "qkvo"] + ["ffn.up_proj", "ffn.down_proj"]
    assert decayed_names(model) == {
        "model.embed_tokens.weight",
        "lm_head.weight",  # tied to the embedding: one parameter under two names
        "model.embed_positions.weight",
        *(f"model.blocks.0.{projection}.weight" for projection in projections),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "dyt", "final_norm": "dyt"},
        {"norm": "rmsnorm", "qk_norm": "rmsnorm", "position": "rotary", "ffn": "gated", "activation": "silu"},
        {"norm_placement": "sandwich"},
        {"norm_placement": "hybrid"},
        {"ffn": "spark", "attention": "spark"},
        {"norm": "none", "activation": "learnable_leaky_relu", "slope_sharing": "global"},
    ],
)
def test_weight_decay_is_that_of_transformers_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    model = NormfreeForCausalLM(NormfreeConfig(vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_positions=8, **options))
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none"), eval_dataset=[])
    assert decayed_names(model) == set(trainer.get_decay_parameter_names(model))


@pytest.mark.parametrize(
    ("kind", "options", "specific"),
    [
        ("linear", {"warmup_ratio": 0.25}, {}),
        ("linear", {"warmup_steps": 0}, {}),
        (
            "cosine_with_min_lr",
            {"learning_rate_decay": "cosine", "final_learning_rate_ratio": 0.3, "warmup_steps": 3},
            {"min_lr_rate": 0.3},
        ),
    ],
)
def test_learning_rates_are_those_of_transformers(
    kind: str, options: dict[str, Any], specific: dict[str, float]
) -> None:
    recipe = Recipe(steps=12, decay_steps=15, precision="fp32", **options)
    weight = torch.nn.Parameter(torch.zeros(1))
    ours = learning_rates(torch.optim.AdamW([weight], lr=recipe.learning_rate), recipe, 16)
    theirs = get_scheduler(
        kind,
        torch.optim.AdamW([weight], lr=recipe.learning_rate),
        num_warmup_steps=recipe.n_warmup_steps(16),
        num_training_steps=15,
        scheduler_specific_kwargs=specific,
    )
    for _ in range(15):
        assert ours.get_last_lr() == theirs.get_last_lr()
        for each in (ours, theirs):
            each.optimizer.step()
            each.step()
