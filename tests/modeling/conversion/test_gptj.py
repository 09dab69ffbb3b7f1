"""GPT-J and ``from_hf`` of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from normfree import from_hf
from normfree.errors import InputError
from normfree.modeling.conversion.gptj import _share
from tests.modeling.conversion.checks import VOCAB, FamilyChecks, assert_same, tokens


class TestGPTJ(FamilyChecks):
    model_class = GPTJForCausalLM
    config_class = GPTJConfig
    sizes = {
        "vocab_size": VOCAB,
        "n_positions": 24,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    cases = {
        "": {},
        "tied": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-2},
        "whole-heads": {"rotary_dim": 8},
        "three-quarters-relu": {"rotary_dim": 6, "n_inner": 20, "activation_function": "relu"},
        "one-pair": {"rotary_dim": 2, "n_head": 1},
    }
    refused = [
        ({"activation_function": "quick_gelu"}, "unknown activation_function 'quick_gelu'"),
        ({"rotary_dim": 0}, "rotary_dim = 0 has no counterpart; only even numbers from 2 to the head_dim 8"),
        ({"rotary_dim": 5}, "rotary_dim = 5 has no counterpart"),
        ({"rotary_dim": 10}, "rotary_dim = 10 has no counterpart"),
        ({"resid_pdrop": 1.0}, "residual_dropout is 1.0"),
    ]
    dropouts = ({"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}, (0.1, 0.2, 0.3))

    def test_weights_are_copies_and_complete(self, case: dict[str, Any]) -> None:
        theirs = self.build(**case)
        ours = from_hf(theirs)
        shared_norms = sum(p.numel() for block in theirs.transformer.h for p in block.ln_1.parameters())
        assert ours.num_parameters() == theirs.num_parameters() + shared_norms
        storages = {p.untyped_storage().data_ptr() for p in theirs.parameters()}
        assert not storages & {p.untyped_storage().data_ptr() for p in ours.parameters()}
        for block in ours.model.blocks:
            assert torch.equal(block.attention_norm.weight, block.ffn_norm.weight)
            assert torch.equal(block.attention_norm.bias, block.ffn_norm.bias)
            assert block.attention_norm.weight.data_ptr() != block.ffn_norm.weight.data_ptr()
        tied = ours.lm_head.weight is ours.model.embed_tokens.weight
        assert tied == ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings

    @torch.no_grad()
    def test_rotary_frequencies_rounded_by_a_cast_are_kept(self) -> None:
        """GPT-J keeps sines and cosines, which no frequency can stand for once they are rounded."""
        theirs = self.build()
        rounded = theirs.to(torch.bfloat16)
        assert from_hf(rounded).dtype == torch.bfloat16
        with pytest.raises(InputError, match="rounded by a conversion to half precision and back"):
            from_hf(rounded.float())
        double = self.build().double()
        assert_same(from_hf(double)(tokens()).logits, double(tokens()).logits)


def test_every_rotary_dim_is_a_share_of_its_head() -> None:
    for head_dim in range(2, 300):
        for rotary_dim in range(2, head_dim + 1, 2):
            share = _share(rotary_dim, head_dim)
            assert int(head_dim * share) == rotary_dim
            assert share <= 1
