"""StableLM and ``from_hf`` of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from normfree import from_hf
from tests.modeling.conversion.checks import FamilyChecks, rope


class TestStableLm(FamilyChecks):
    model_class = StableLmForCausalLM
    config_class = StableLmConfig
    cases = {
        "": {},
        "biased-tied": {"use_qkv_bias": True, "tie_word_embeddings": True, "layer_norm_eps": 1e-2},
        "qk-layernorm": {"qk_layernorm": True},
        "qk-layernorm-multi-head": {"qk_layernorm": True, "num_key_value_heads": 4, "layer_norm_eps": 1e-2},
        "whole-heads-rotate": rope("default", partial_rotary_factor=1.0),
        "half-rotary-linear": rope("linear", factor=2.0, partial_rotary_factor=0.5),
        "eleven-heads": {"qk_layernorm": True, "num_attention_heads": 11, "num_key_value_heads": 11, "hidden_size": 88},
    }
    parallel = {
        "parallel": {"use_parallel_residual": True},
        "parallel-qk-layernorm-biased": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    }
    refused = [
        ({"hidden_act": "hardswish"}, "unknown hidden_act 'hardswish'"),
        ({"hidden_dropout": 0.1}, r"hidden_dropout = 0\.1 has no counterpart"),
    ]

    @pytest.mark.parametrize("options", parallel.values(), ids=parallel)
    def test_parallel_blocks(self, options: dict[str, Any]) -> None:
        """Two copies of one norm: the same function, one more gain and bias a layer."""
        for implementation in ("eager", "sdpa"):
            self.test_same_logits(options, implementation)
        self.test_same_generation_with_and_without_cache(options)
        theirs = self.build(**options)
        ours = from_hf(theirs)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + 3 * 2 * 32
        for block in ours.model.blocks:
            assert torch.equal(block.attention_norm.weight, block.ffn_norm.weight)
            assert block.attention_norm.weight.data_ptr() != block.ffn_norm.weight.data_ptr()
