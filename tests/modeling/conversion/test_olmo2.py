"""OLMo 2 and ``from_hf`` of it."""

from __future__ import annotations

from transformers import Olmo2Config, Olmo2ForCausalLM

from tests.modeling.conversion.checks import FamilyChecks, rope


class TestOlmo2(FamilyChecks):
    model_class = Olmo2ForCausalLM
    config_class = Olmo2Config
    cases = {
        "": {},
        "multi-head-tied": {"num_key_value_heads": None, "tie_word_embeddings": True},
        "multi-query-biased": {"num_key_value_heads": 1, "attention_bias": True, "rms_norm_eps": 1e-2},
        "head-dim": {"head_dim": 12},
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    }
    refused = [
        ({"hidden_act": "hardswish"}, "unknown hidden_act 'hardswish'"),
        (rope("default", partial_rotary_factor=0.5), "which Olmo2ForCausalLM does not follow"),
    ]
