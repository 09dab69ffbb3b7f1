"""Mistral and ``from_hf`` of it."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM

from tests.modeling.conversion.checks import FamilyChecks, rope


class TestMistral(FamilyChecks):
    model_class = MistralForCausalLM
    config_class = MistralConfig
    cases = {
        "": {},
        "full": {"sliding_window": None},
        "window": {"sliding_window": 4},
        "window-of-the-sequence": {"sliding_window": 12},
        "smallest-window": {"sliding_window": 2, "num_key_value_heads": 1},
        "head-dim-tied": {"head_dim": 12, "tie_word_embeddings": True, "sliding_window": 7, "rms_norm_eps": 1e-2},
        "layer-types-of-one-kind": {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    }
    refused = [
        ({"hidden_act": "hardswish"}, "unknown hidden_act 'hardswish'"),
        ({"sliding_window": 1}, "sliding_window is 1; .* at least 2"),
        ({"sliding_window": 0}, "sliding_window is 0; .* at least 2"),
        (rope("default", partial_rotary_factor=0.5), "which MistralForCausalLM does not follow"),
        (
            {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"layer_types = \['full_attention', .*\] with sliding_window = 4, which MistralForCausalLM does not follow",
        ),
    ]
