"""Folded models against the constant-std model's own logits, and against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf, remove_norms
from normfree.errors import InputError
from normfree.modeling.constant_std import ConstantStdNorm
from normfree.removal.fold import Affine, after_norm

from ..modeling.test_no_norm_op import NORMALIZING, ops_of
from .models import STOCK, VOCAB, constant_std, constant_std_of, perturbed, stock, tokens


def logits(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model.to(dtype)(tokens()).logits


@pytest.mark.parametrize("name", STOCK)
def test_the_logits_stay(name: str) -> None:
    model = constant_std_of(name)
    folded = remove_norms(model)
    assert not any("norm" in each for each in folded.state_dict())
    torch.testing.assert_close(logits(folded), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(remove_norms(model.double()), torch.float64), logits(model, torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", STOCK)
def test_the_traced_graph_holds_no_norm_op(name: str) -> None:
    model = constant_std_of(name)
    assert ops_of(model) & NORMALIZING
    assert ops_of(remove_norms(model)) & NORMALIZING == set()


@pytest.mark.parametrize("name", STOCK)
def test_it_is_a_transformers_model(name: str, tmp_path: Path) -> None:
    folded = remove_norms(constant_std_of(name))
    folded.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is NormfreeForCausalLM
    assert torch.equal(logits(again), logits(folded))
    assert torch.equal(
        again.generate(tokens(1, 5), max_new_tokens=6, do_sample=False),
        folded.generate(tokens(1, 5), max_new_tokens=6, do_sample=False),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": "none", "mlp_bias": False},
        {"attention_bias": "qk", "n_kv_head": 2, "ffn": "gated", "mlp_bias": False},
        {"attention_bias": "qkv", "tie_word_embeddings": False, "lm_head_bias": True},
        {"final_norm": "none", "norm": "layernorm"},
        {"final_norm": "layernorm", "norm": "none", "attention_bias": "none"},
        {"norm": "rmsnorm", "final_norm": "rmsnorm", "attention_bias": "none"},
        {"parallel_residual": True, "position": "rotary"},
        {
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
            "embedding_multiplier": 4.0,
            "attention_scale": 0.7,
            "positions_skip_padding": True,
        },
    ],
)
def test_options(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 24, "n_layer": 2, "n_head": 4, "n_embd": 16}
    torch.manual_seed(0)
    source = perturbed(NormfreeForCausalLM(NormfreeConfig(**sizes, **options)))
    centered = "rmsnorm" not in (source.config.norm, source.config.final_norm)
    model = constant_std(source, norm_is_centered=centered)
    folded = remove_norms(model)
    torch.testing.assert_close(logits(folded), logits(model), rtol=1e-5, atol=1e-5)
    assert folded.config.tie_word_embeddings == (options.get("final_norm") == "none")


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    centered=st.booleans(),
    biased=st.booleans(),
    offset=st.sampled_from([0.0, 100.0]),
    std=st.floats(1e-2, 1e3),
    n_reader=st.integers(1, 2),
)
def test_a_folded_reader_is_the_formula(
    seed: int, centered: bool, biased: bool, offset: float, std: float, n_reader: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = ConstantStdNorm(12, n_reader=n_reader, is_centered=centered).double()
    reader = torch.nn.Linear(12, 7, bias=biased).double()
    with torch.no_grad():
        for parameter in (*norm.parameters(), *reader.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        norm.std[-1] = std
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64) + offset
        kept = x - x.mean(-1, keepdim=True) if centered else x
        bias = norm.bias if norm.bias is not None else 0.0
        expected = (kept / std * norm.weight + bias) @ reader.weight.T + (reader.bias if biased else 0.0)
        weight, shift = after_norm(Affine(reader.weight, reader.bias), norm, n_reader - 1)
        assert (shift is not None) == (centered or biased)
        folded = x @ weight.T + (0.0 if shift is None else shift)
        reading = norm(x)
        torch.testing.assert_close(reader(reading if n_reader == 1 else reading[-1]), expected)
    torch.testing.assert_close(folded, expected, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_folded_is_named() -> None:
    with pytest.raises(InputError, match=r"norm 'layernorm' divides by each token's own std.*remove-norm"):
        remove_norms(from_hf(stock("gpt2")))
    sizes: dict[str, Any] = {"vocab_size": 9, "n_positions": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"norm": "dyt"}, "norm 'dyt' is a tanh and no division by a std"),
        ({"norm": "derf"}, "norm 'derf' is an erf and no division by a std"),
        ({"norm": "none", "final_norm": "dyt"}, "final_norm 'dyt' is a tanh"),
        ({"norm": "rmsnorm_scaling"}, "norm 'rmsnorm_scaling' divides by each token's own std"),
        ({"norm": "none", "final_norm": "none", "qk_norm": "rmsnorm"}, "its qk_norm 'rmsnorm' has no constant std"),
        ({"norm": "layernorm", "norm_placement": "hybrid"}, "norm 'layernorm' divides by each token's own std"),
    )
    for options, message in refused:
        with pytest.raises(InputError, match=message):
            remove_norms(NormfreeForCausalLM(NormfreeConfig(**sizes, **options)))
    free = remove_norms(constant_std_of("gpt2"))
    with pytest.raises(InputError, match="no norm to remove"):
        remove_norms(free)
    with pytest.raises(InputError, match="norm_is_centered means nothing"):
        NormfreeConfig(norm_is_centered=False)
