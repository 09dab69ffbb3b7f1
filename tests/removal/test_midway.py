"""A model whose norms go one by one: its logits before, between and after, against the stock model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf, remove_norms
from normfree.errors import InputError
from normfree.removal.midway import Midway
from normfree.removal.schedule import automatic_schedule

from .models import STOCK, constant_std_of, scheduled, stock, tokens


def begun(name: str) -> Midway:
    """Two training batches after its norms have been made removable."""
    midway = Midway(from_hf(stock(name)).double(), scheduled(std_momentum=0.5))
    midway.model.train()
    for _ in range(2):
        midway.model(tokens(), labels=tokens())
    midway.model.eval()
    return midway


def remove_all(midway: Midway) -> None:
    for removal in automatic_schedule(3, 300).removals(midway_config(midway)):
        midway.apply(removal)
    midway.finish()


def midway_config(midway: Midway) -> NormfreeConfig:
    options = {name: getattr(midway.model.config, name) for name in NormfreeConfig.option_names()}
    return NormfreeConfig(**options | midway.original)


def settled(midway: Midway, folder: Path) -> NormfreeForCausalLM:
    """What a checkpoint of the finished removal holds."""
    midway.model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert isinstance(loaded, NormfreeForCausalLM)
    return loaded


@pytest.mark.parametrize("name", STOCK)
def test_the_function_stays_until_the_first_removal(name: str) -> None:
    with torch.no_grad():
        expected = stock(name).double()(tokens()).logits
        torch.testing.assert_close(
            begun(name).model(tokens()).logits, expected, rtol=1e-5, atol=1e-5
        )  # Llama's norm is float32


@pytest.mark.parametrize("name", STOCK)
def test_what_is_left_at_the_end_is_folded_away(name: str, tmp_path: Path) -> None:
    midway = begun(name)
    remove_all(midway)
    constant = settled(midway, tmp_path)
    assert constant.config.norm == constant.config.final_norm == "constant_std"
    with torch.no_grad():
        expected = midway.model(tokens()).logits
        torch.testing.assert_close(constant(tokens()).logits, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(remove_norms(constant)(tokens()).logits, expected, rtol=1e-8, atol=1e-8)


def test_only_the_readers_that_are_removed_change() -> None:
    midway = begun("gpt2")
    with torch.no_grad():
        for removal in automatic_schedule(3, 300).removals(midway_config(midway)):
            before = midway.model(tokens()).logits
            midway.apply(removal)
            after = midway.model(tokens()).logits
            if removal.part == "end_of_text" and not (tokens() == 2).any():
                assert torch.equal(before, after)
            else:
                assert not torch.equal(before, after), removal
    assert all(all(norm.is_constant) for _, norm in midway.norms())


def test_a_checkpoint_from_between_is_no_finished_model(tmp_path: Path) -> None:
    midway = begun("gpt2")
    midway.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="unknown norm 'removable'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not finished: 7 norms, model.blocks.0.attention_norm first"):
        midway.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "none", "final_norm": "none"}, "has no norm to remove"),
        ({"norm": "constant_std"}, "norm 'constant_std' cannot be removed"),
        ({"norm": "dyt"}, "norm 'dyt' cannot be removed; allowed: layernorm, rmsnorm, layernorm_scaling"),
        ({"norm": "derf"}, "norm 'derf' cannot be removed; allowed: layernorm, rmsnorm, layernorm_scaling"),
        ({"final_norm": "dyt"}, "final_norm 'dyt' cannot be removed"),
        (
            {"ffn": "spark", "attention": "spark", "n_embd": 16, "n_inner": 64, "activation": "relu"},
            "norms cannot be removed before ffn 'spark'",
        ),
    ],
)
def test_models_without_norms_to_remove(options: dict[str, Any], message: str) -> None:
    sizes = {"vocab_size": 9, "n_positions": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
    model = NormfreeForCausalLM(NormfreeConfig(**{**sizes, **options}))
    with pytest.raises(InputError, match=message):
        Midway(model, scheduled())


def test_qk_norms_to_remove_must_be_there() -> None:
    for options, message in (
        (dict[str, Any](), "qk_norms is remove, and the model's qk_norm is none"),
        ({"qk_norm": "rmsnorm", "qk_norm_is_constant": True}, "qk_norm is constant already"),
    ):
        config = NormfreeConfig(vocab_size=9, n_positions=4, n_layer=1, n_head=1, n_embd=4, **options)
        with pytest.raises(InputError, match=message):
            Midway(NormfreeForCausalLM(config), scheduled(qk_norms="remove"))


def test_settled_models_are_those_of_the_other_tests(tmp_path: Path) -> None:
    midway = begun("llama")
    remove_all(midway)
    config = settled(midway, tmp_path).config
    ours = {option: getattr(config, option) for option in NormfreeConfig.option_names()}
    theirs = {option: getattr(constant_std_of("llama").config, option) for option in NormfreeConfig.option_names()}
    assert ours == theirs
