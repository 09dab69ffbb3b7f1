"""``normfree remove-norm``: what it plans for which model, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.removal.plan import RECIPE, plan
from normfree.removal.schedule import (
    PRETRAINED_RECIPE,
    load_schedule,
    pretrained_schedule,
)
from normfree.training import RunConfig, RunResult
from normfree.training.lora import LoraOptions

from .small_removals import T, corpus, gpt2

__all__ = ["corpus", "gpt2"]
Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("qk_norms", ["keep", "remove"])
def test_the_command_keeps_or_removes_qk_norms(qk_norms: str, normfree: Command, corpus: Path, tmp_path: Path) -> None:
    """A model that is no run, so by the schedule for pretrained ones."""
    options: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 270, "hidden_size": 32}
    options |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": T}
    options |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**options)).save_pretrained(tmp_path / "gemma")
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270", "--steps", "30"]
    size += ["--set", f"data.sequence_length={T}", "--set", f"data.eval_tokens={20 * T}"]
    size += ["--set", "recipe.batch_size=4", "--set", "recipe.micro_batch_size=4"]
    code, out, err = normfree(
        "remove-norm", tmp_path / "gemma", *size, "--qk-norms", qk_norms, "--no-vanilla", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    parts = set(pd.read_csv(Path(found["folder"]) / "removal" / "norm-costs.csv")["part"])
    block_parts = {"ffn", "attention_qk", "attention_v", "ffn_output", "attention_output", "final"}
    assert parts == block_parts | ({"qk_norm"} if qk_norms == "remove" else set())
    norm_free: Any = AutoModelForCausalLM.from_pretrained(found["norm_free"])
    assert norm_free.config.qk_norm == ("none" if qk_norms == "remove" else "rmsnorm")
    if qk_norms == "keep":
        assert found["stock"] is None
        assert "qk_norm = 'rmsnorm' has no counterpart in Gemma 3: its norms share one ε" in err
    else:
        stock_model: Any = AutoModelForCausalLM.from_pretrained(found["stock"])
        assert type(stock_model) is Gemma3ForCausalLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--schedule", "gpt2", "--steps", "30"],
            "last removal (first_token) is at step 53, and the budget ends after 30",
        ),
        (["--schedule", "gpt3"], "unknown removal schedule 'gpt3'"),
        (["--schedule", "twice.yaml"], "the schedule removes final twice; name it once"),
        (["--set", "recipe.learning_rates=1"], "unknown option 'recipe.learning_rates'"),
        (["--set", "lr=1"], "unknown option 'lr' (did you mean 'recipe.learning_rate'?)"),
        (["--set", "recipe.logging_steps=2"], "set recipe.logging_steps to 1, not 2"),
        (["--set", "lora.alpha=2"], "unknown option 'lora.alpha'"),
        (["--lora", "2", "--set", "lora.dropout=1"], "unknown option 'lora.dropout'"),
        (["--qk-norms", "remove"], "qk_norms is remove, and the model's qk_norm is none; leave it out"),
        (["--lora", "0"], "Invalid value for '--lora'"),
        (["--tokens", "9", "--steps", "9"], "give --tokens or --steps, not both"),
    ],
)
def test_bad_input_writes_nothing(
    arguments: list[str], message: str, normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path
) -> None:
    stage = "{part: final, after: 2}"
    (tmp_path / "twice.yaml").write_text(f"stages: [{stage}, {stage}]")
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270"]
    size += ["--set", "data.sequence_length=24", "--set", "recipe.batch_size=4", "--set", "recipe.micro_batch_size=4"]
    code, _, err = normfree("remove-norm", gpt2, *size, "--out", "out", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_run_of_ours_takes_another_tokenizer_with_its_vocabulary(
    plain_run: RunResult, tiny_run: Callable[..., RunConfig], data: PackedData
) -> None:
    model = str(plain_run.folder)
    planned = plan(model, changes={}, seed=3)
    assert (planned.run.data, planned.run.seed) == (tiny_run().data, 3)
    assert planned.fingerprint == data.fingerprint, "on the very tokens it was trained on"
    changed = plan(model, changes={"data.tokenizer": "gpt2"}, seed=0)
    assert (changed.run.data.tokenizer, changed.fingerprint) == ("gpt2", None)
    assert changed.run.recipe.batch_size == tiny_run().recipe.batch_size
    low_rank = plan(model, changes={"lora.alpha": 3}, seed=0, lora_rank=6)
    assert low_rank.run.lora == LoraOptions(rank=6, alpha=3)


def test_a_schedule_brings_its_recipe(
    plain_run: RunResult, tiny_run: Callable[..., RunConfig], gpt2: Path, corpus: Path
) -> None:
    published = load_schedule("gpt2-xl")
    changes = {"data.corpus": f"directory:{corpus}", "data.tokenizer": "train"}
    recipe = plan(str(gpt2), changes=changes, seed=0, schedule=published).run.recipe
    assert (recipe.steps, recipe.decay_steps, recipe.warmup_steps) == (800, 1200, 20)
    assert (recipe.learning_rate, recipe.final_learning_rate_ratio, recipe.batch_size) == (1e-4, 0.2, 512)
    given = {**changes, "recipe.learning_rate": 3e-4, "recipe.steps": 900}
    recipe = plan(str(gpt2), changes=given, seed=0, schedule=published).run.recipe
    assert (recipe.steps, recipe.learning_rate, recipe.decay_steps) == (900, 3e-4, 1200)
    recipe = plan(str(plain_run.folder), changes={}, seed=0, schedule=published).run.recipe
    assert (recipe.steps, recipe.batch_size) == (800, tiny_run().recipe.batch_size)


def test_default_schedules_are_for_runs_and_for_other_models(plain_run: RunResult, gpt2: Path, corpus: Path) -> None:
    changes: dict[str, Any] = {"data.corpus": f"directory:{corpus}", "data.tokenizer": "train"}
    pretrained = plan(str(gpt2), changes=changes, seed=0)
    assert pretrained.schedule == pretrained_schedule(3, 300)
    assert (pretrained.run.recipe.learning_rate, pretrained.run.recipe.steps) == (PRETRAINED_RECIPE.learning_rate, 300)
    assert plan(str(gpt2), changes=changes | {"recipe.learning_rate": 1e-5}, seed=0).run.recipe.learning_rate == 1e-5
    own = plan(str(plain_run.folder), changes={}, seed=0)
    assert (own.schedule.order, own.schedule.special_tokens) == ("published", "separate")
    assert own.run.recipe.learning_rate == RECIPE["learning_rate"]


def test_models_that_cannot_be_removed_from(normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    code, _, err = normfree("remove-norm", gpt2)
    assert code == 2
    assert "name a corpus to fine-tune on with --corpus" in err
    options: dict[str, Any] = {"norm": "none", "final_norm": "none", "n_positions": 24}
    free = NormfreeForCausalLM(NormfreeConfig(vocab_size=270, n_layer=1, n_head=2, n_embd=8, **options))
    free.save_pretrained(tmp_path / "free")
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270"]
    code, _, err = normfree("remove-norm", tmp_path / "free", *size, "--set", "data.sequence_length=24")
    assert code == 2
    assert "the model has no norm to remove" in err
