"""Llama and ``from_hf`` of it."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from tests.modeling.conversion.checks import FamilyChecks, rope


class TestLlama(FamilyChecks):
    model_class = LlamaForCausalLM
    config_class = LlamaConfig
    cases = {
        "": {},
        "multi-head-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
        "multi-query-biased": {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-2,
        },
        "head-dim": {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"},
        "llama3": rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        ),
        "linear": rope("linear", factor=2.0),
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        "dynamic": {**rope("dynamic", factor=4.0), "max_position_embeddings": 8},
        "longrope": rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=8,
            short_factor=[1.0, 1.5, 2.0, 2.5],
            long_factor=[2.0, 3.0, 4.0, 5.0],
        ),
    }
    refused = [
        ({"hidden_act": "hardswish"}, "unknown hidden_act 'hardswish'"),
        (rope("default", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5, which LlamaForCausalLM does not"),
    ]
