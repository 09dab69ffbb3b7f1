"""Phi-3 and ``from_hf`` of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from normfree import from_hf
from tests.modeling.conversion.checks import FamilyChecks, padding_mask, rope, tokens


def longrope(original: int, pairs: int = 4, **options: Any) -> dict[str, Any]:
    factors = [1.0 + 0.5 * pair for pair in range(pairs)]
    return {
        **rope(
            "longrope",
            original_max_position_embeddings=original,
            short_factor=factors,
            long_factor=[3 * factor for factor in factors],
            **options,
        ),
        "original_max_position_embeddings": original,
    }


class TestPhi3(FamilyChecks):
    model_class = Phi3ForCausalLM
    config_class = Phi3Config
    cases = {
        "": {},
        "multi-head-tied": {"num_key_value_heads": None, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        "multi-query": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
        "window": {"sliding_window": 4},
        "partial-rotary": rope("default", partial_rotary_factor=0.5),
        "longrope-short": longrope(32),
        "longrope-long": longrope(8),
        "longrope-partial-window": {**longrope(8, pairs=2, partial_rotary_factor=0.5), "sliding_window": 5},
        "longrope-crossed": longrope(16),
    }
    refused = [
        ({"hidden_act": "hardswish"}, "unknown hidden_act 'hardswish'"),
        ({"sliding_window": 1}, "sliding_window is 1; .* at least 2"),
        ({"resid_pdrop": 1.0}, r"residual_dropout is 1\.0"),
    ]
    dropouts = (
        {"attention_dropout": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.4},
        (0.0, 0.2, 0.3),
    )

    @pytest.mark.parametrize("original", range(11, 22))
    @torch.no_grad()
    def test_generation_across_the_original_length(self, original: int) -> None:
        """The frequencies change at one length; keys of the shorter one are not kept."""
        theirs = self.build(**longrope(original))
        ours = from_hf(theirs)
        options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for mask in (torch.ones(3, 12, dtype=torch.long), padding_mask("left")):
            arguments: dict[str, Any] = {
                "attention_mask": mask,
                "output_logits": True,
                "return_dict_in_generate": True,
                **options,
            }
            expected = theirs.generate(tokens(), **arguments)
            actual = ours.generate(tokens(), **arguments)
            assert torch.equal(actual.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)
        short = ours.generate(tokens()[1:, :5], use_cache=True, **options)
        assert torch.equal(short, ours.generate(tokens()[1:, :5], use_cache=False, **options))
