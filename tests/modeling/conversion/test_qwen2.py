"""Qwen2 and Qwen2.5 and ``from_hf`` of them."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM

from normfree import from_hf
from tests.modeling.conversion.checks import FamilyChecks, rope

FULL, SLIDING = "full_attention", "sliding_attention"


class TestQwen2(FamilyChecks):
    model_class = Qwen2ForCausalLM
    config_class = Qwen2Config
    cases = {
        "": {},
        "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        "window-not-used": {"use_sliding_window": False, "sliding_window": 4},
        "window-of-last-layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "window-of-no-layer": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
        "layer-types": {"use_sliding_window": True, "sliding_window": 3, "layer_types": [SLIDING, FULL, SLIDING]},
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        "head-dim": {"head_dim": 12},
    }
    refused = [
        ({"hidden_act": "hardswish"}, "unknown hidden_act 'hardswish'"),
        (rope("default", partial_rotary_factor=0.5), "which Qwen2ForCausalLM does not follow"),
        ({"layer_types": [FULL, FULL, "chunked_attention"]}, "unknown layer type 'chunked_attention'"),
        ({"layer_types": [SLIDING, FULL, FULL]}, "needs a window; give sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 0}, "sliding_window is 1"),
    ]

    def test_biases_are_those_of_queries_keys_and_values(self) -> None:
        assert from_hf(self.build()).config.attention_bias == "qkv"
