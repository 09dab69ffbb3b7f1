"""Qwen3 and ``from_hf`` of it."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.modeling.conversion.checks import FamilyChecks, rope


class TestQwen3(FamilyChecks):
    model_class = Qwen3ForCausalLM
    config_class = Qwen3Config
    sizes = {**FamilyChecks.sizes, "head_dim": 12}
    cases = {
        "": {},
        "tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-2},
        "window-of-last-layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    }
    refused = [
        (rope("default", partial_rotary_factor=0.5), "which Qwen3ForCausalLM does not follow"),
        ({"layer_types": ["full_attention", "full_attention", "chunked_attention"]}, "unknown layer type 'chunked"),
    ]
