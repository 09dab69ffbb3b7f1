"""int8 models against the rounding written out in NumPy."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf
from normfree.errors import InputError
from normfree.interpret import check_quantization, quantization, quantization_cost, quantized

SCHEMES = ("int8_weights", "int8_weights_activations")
CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = NormfreeConfig(
        vocab_size=60, n_layer=2, n_head=2, n_embd=16, n_positions=8, initializer_range=0.3, mlp_bias=True, norm="none"
    )
    return NormfreeForCausalLM(config).eval()


def rounded_rows(x):
    """Each row rounded to int8 and back, symmetrically: scale max |x| / 127.5."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127.5)
    # The largest number of a row lies halfway between two integers, where the precision of the division decides.
    integers = np.clip(np.round(x * (np.float32(1) / scale)), -128, 127)
    return scale.astype(np.float64) * integers


def numpy_linear(layer, x, scheme):
    weight, x = layer.weight.detach().numpy(), x.numpy()
    inputs = rounded_rows(x) if scheme == "int8_weights_activations" else x.astype(np.float64)
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    return inputs @ rounded_rows(weight).T + bias


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_layer_computes_with_rounded_numbers(model, scheme):
    smaller = quantized(model, scheme)
    originals = dict(model.named_modules())
    draw = torch.Generator().manual_seed(1)
    layers = {name: each for name, each in smaller.model.blocks.named_modules() if isinstance(each, nn.Linear)}
    assert len(layers) == 2 * 6
    for name, layer in layers.items():
        x = torch.randn(3, 5, layer.in_features, generator=draw)
        x[0, 0, 0] = 40  # an outlier costs its token the precision of all other channels
        original = originals[f"model.blocks.{name}"]
        expected = numpy_linear(original, x, scheme)
        with torch.no_grad():
            np.testing.assert_allclose(layer(x).numpy(), expected, rtol=2e-5, atol=2e-5, err_msg=name)
            assert not np.allclose(original(x).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embeddings_and_the_model_itself_stay_as_they_are(model, scheme):
    before = {name: each.clone() for name, each in model.state_dict().items()}
    smaller = quantized(model, scheme)
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert torch.equal(smaller.lm_head.weight, model.lm_head.weight)
    assert smaller.lm_head.weight.dtype == torch.float32
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name]), name


def test_cost_is_that_of_the_losses_on_the_same_sequences(model):
    sequences = torch.randint(0, 60, (5, 8))
    frame = quantization_cost(model, sequences, batch_size=2).set_index("precision")
    assert frame.index.tolist() == ["full_precision", *SCHEMES]
    for precision in frame.index:
        chosen = model if precision == "full_precision" else quantized(model, precision)
        with torch.no_grad():
            expected = chosen(sequences, labels=sequences).loss.item()
        assert frame.loc[precision, "eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert frame.loc[precision, "eval_ppl"] == pytest.approx(np.exp(expected), rel=1e-4)
    full = frame["eval_ppl"].loc["full_precision"]
    np.testing.assert_allclose(frame["increase_percent"], 100 * (frame["eval_ppl"] / full - 1), atol=1e-9)


def test_an_outlier_channel_makes_activations_dear_and_weights_not(model):
    sequences = torch.randint(0, 60, (5, 8))
    with torch.no_grad():
        # A channel that nothing reads: the model is the same, but each token's scale is spent on it.
        model.model.embed_tokens.weight[:, 0] = 300.0
        model.model.final_norm.weight[0] = 0
        for block in model.model.blocks:
            for layer in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj, block.ffn.up_proj):
                layer.weight[:, 0] = 0
    cost = quantization_cost(model, sequences).set_index("precision")["increase_percent"].abs()
    assert cost["int8_weights_activations"] > 5 * cost["int8_weights"]


def test_nan_is_the_cost_of_a_model_with_nan(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = torch.nan
    sequences = torch.full((3, 8), 7)
    frame = quantization_cost(model, sequences)
    assert frame[["eval_loss", "eval_ppl", "increase_percent"]].isna().all(axis=None)


def test_other_models_with_linear_layers_can_be_quantized():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes, bos_token_id=0, eos_token_id=0)).eval()
    frame = quantization_cost(model, torch.randint(0, 60, (2, 8)))
    assert np.isfinite(frame["eval_loss"]).all()


def mixtral():
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    experts: dict[str, Any] = {"num_local_experts": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(vocab_size=60, **sizes, **experts)).eval()


def gpt2_with_one_linear_layer():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=60, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.h[1].mlp.c_fc = nn.Linear(16, 64)
    return model


def jamba_like():
    model = gpt2_with_one_linear_layer()
    for block in model.transformer.h:
        block.attn, block.mlp = nn.Linear(16, 16), nn.Conv1d(16, 16, 4, groups=16)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (mixtral, r"leave 6 weights of MixtralForCausalLM in full precision, model.layers.0.mlp.gate.weight"),
        (gpt2_with_one_linear_layer, r"leave 7 weights of GPT2LMHeadModel in full precision, transformer.h.0.attn"),
        (jamba_like, r"leave 2 weights of GPT2LMHeadModel in full precision, transformer.h.0.mlp.weight"),
    ],
)
def test_a_model_that_int8_would_reach_in_part_is_refused(make, says):
    for scheme in SCHEMES:
        with pytest.raises(InputError, match=says):
            quantized(make(), scheme)


def test_gpt2s_own_layers_are_refused_and_converted_ones_are_not():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=60, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with pytest.raises(InputError, match=r"hold no nn.Linear to quantize; convert it with normfree.from_hf"):
        quantized(model, "int8_weights")
    assert len(quantization_cost(from_hf(model), torch.randint(0, 60, (2, 8)))) == 3


def test_bad_input_is_refused(model):
    with pytest.raises(InputError, match=r"unknown quantization scheme 'int8_weight' \(did you mean 'int8_weights'"):
        quantized(model, "int8_weight")
    with pytest.raises(InputError, match="at least 2"):
        quantization_cost(model, torch.zeros(3, 1, dtype=torch.long))


def test_without_torchao_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"pip install 'normfree\[quantization\]'"):
        quantized(model, "int8_weights")
    with pytest.raises(InputError, match=r"pip install 'normfree\[quantization\]'"):
        check_quantization(CPU)


def test_a_processor_that_saturates_is_refused(monkeypatch):
    check_quantization(CPU)

    def saturating(linear, scheme):
        linear.forward = lambda x: torch.full((*x.shape[:-1], linear.out_features), 32.5)

    monkeypatch.setattr(quantization, "_quantize", saturating)
    with pytest.raises(InputError, match=r"int8 matrix products overflow on this cpu \(32.5 for 64\)"):
        check_quantization(CPU)
