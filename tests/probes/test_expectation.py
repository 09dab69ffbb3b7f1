"""Attention is found by what modules do, not by what they are called."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.probes import EntropyProbe

from .small_models import batch_of, build

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LONGCAT: dict[str, Any] = SIZES | LATENT | {
    "num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "n_routed_experts": 2, "zero_expert_num": 1,
    "moe_topk": 2,
}  # fmt: skip


def model_of(model_type, **sizes):
    torch.manual_seed(0)
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).eval()


def probe_of(model):
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=batch_of("none")["input_ids"])
    return probe


def test_latent_attention_that_is_not_called_attention():
    probe = probe_of(model_of("longcat_flash", **LONGCAT))
    assert probe.unreadable == {}
    assert [name.removeprefix("model.layers.") for name in probe.layers] == [
        f"{layer}.self_attn.{half}" for layer in range(2) for half in range(2)
    ]


def test_attention_of_each_token_to_layers_is_not_attention_to_tokens():
    probe = probe_of(model_of("inkling2_loop_text", **SIZES, num_hidden_layers=4, num_experts=2))
    over_tokens = [name for name in probe.layers if name.endswith("self_attn")]
    assert len(over_tokens) == 4
    assert not set(over_tokens) & set(probe.unreadable)
    others = set(probe.layers) - set(over_tokens)
    assert others
    assert others == set(probe.unreadable)
    assert any("not tokens" in probe.unreadable[name] for name in others)


@pytest.mark.parametrize("kind", ["softmax", "spark"])
def test_before_a_pass_layers_are_those_that_will_attend(kind):
    sizes: dict[str, Any] = {"vocab_size": 50, "n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 16}
    model = NormfreeForCausalLM(NormfreeConfig(**sizes, attention=kind))
    probe = EntropyProbe(model)
    assert probe.layers == tuple(f"model.blocks.{layer}.attention" for layer in range(3))
    assert set(probe.unreadable) == set(probe.layers)


def test_a_layer_that_is_skipped_is_named():
    model = build("llama", num_hidden_layers=3)
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    probe = probe_of(model)
    assert list(probe.unreadable) == ["model.layers.1.self_attn"]
    assert "forward passes seen have not called it" in probe.unreadable["model.layers.1.self_attn"]
    assert probe.per_head()[1].isnan().all()
    assert not probe.per_head()[[0, 2]].isnan().any()


def test_attention_without_a_softmax_is_named():
    class LinearAttention(nn.Module):
        def forward(self, x):
            return x @ (x.mT @ x)

    model = nn.Sequential(nn.Embedding(50, 32), LinearAttention(), build("llama").model.layers[0].mlp)
    probe = probe_of_sequential(model)
    assert list(probe.unreadable) == ["1"]
    assert "no softmax over keys" in probe.unreadable["1"]


def probe_of_sequential(model):
    with EntropyProbe(model) as probe, torch.no_grad():
        model(batch_of("none")["input_ids"])
    return probe


class Mixer(nn.Module):
    """Asks for an attention function in a method of its own."""

    def forward(self, x):
        return x + self.mix(x.unflatten(-1, (4, 8)).transpose(1, 2)).flatten(2)

    def mix(self, x):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)  # type: ignore[arg-type]
        return attend(self, x, x, x, None, is_causal=True, scaling=1.0)[0]


def test_a_module_of_any_name_is_expected_by_its_code_and_one_around_it_is_not():
    class AttentionBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Mixer()

        def forward(self, x):
            return self.mixer(x)

    model = nn.Sequential(nn.Embedding(50, 32), AttentionBlock(), AttentionBlock())
    assert EntropyProbe(model).layers == ("1.mixer", "2.mixer")
    probe = probe_of_sequential(model)
    assert probe.layers == ("1.mixer", "2.mixer")
    assert probe.unreadable == {}


def test_routers_are_no_attention():
    sizes: dict[str, Any] = SIZES | {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    probe = probe_of(model_of("qwen3_moe", **sizes))
    assert probe.layers == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert probe.unreadable == {}


def test_without_any_attention_there_is_nothing_to_probe():
    with pytest.raises(InputError, match="no attention module"):
        EntropyProbe(nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32)))
