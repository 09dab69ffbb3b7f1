"""Gemma 2 and ``from_hf`` of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from normfree import from_hf
from normfree.errors import InputError
from tests.modeling.conversion.checks import FamilyChecks, assert_same, rope, tokens

WINDOW = {"sliding_window": 5}
SIZES = {**FamilyChecks.sizes, **WINDOW, "num_hidden_layers": 4, "head_dim": 12, "query_pre_attn_scalar": 10}


class GemmaChecks(FamilyChecks):
    """What Gemma 2 and 3 have in common."""

    sizes = SIZES

    def test_mode_dtype_and_generation_config_are_kept(self) -> None:
        theirs = self.build().to(torch.bfloat16).train()
        message = r"computes model\..*norm\.weight from other weights, and bfloat16 cannot hold.*from_hf\(model\.float"
        with pytest.raises(InputError, match=message):
            from_hf(theirs)
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                if name.endswith("norm.weight"):
                    weight.copy_((weight * 128).round() / 128)  # with these 1 + weight is exact
        ours = from_hf(theirs)
        assert ours.training
        assert ours.dtype == ours.config.dtype == torch.bfloat16
        assert ours.config.embedding_multiplier == float(torch.tensor(32**0.5).bfloat16())
        theirs, ours = theirs.eval(), ours.eval()
        with torch.no_grad():
            expected = theirs(tokens()).logits
            torch.testing.assert_close(ours(tokens()).logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))

    @torch.no_grad()
    def test_embeddings_as_input_are_scaled_by_the_embedding(self) -> None:
        theirs = self.build()
        ours = from_hf(theirs)
        embedded = theirs.get_input_embeddings()(tokens())
        assert_same(ours.get_input_embeddings()(tokens()), embedded)
        assert_same(ours(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits)

    def test_the_window_is_shorter_than_the_sequences(self) -> None:
        theirs = self.build()
        wide = self.build(sliding_window=64)
        with torch.no_grad():
            assert not torch.allclose(theirs(tokens()).logits, wide(tokens()).logits, atol=1e-3)


class TestGemma2(GemmaChecks):
    model_class = Gemma2ForCausalLM
    config_class = Gemma2Config
    cases = {
        "": {},
        "caps-that-bite": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5},
        "without-caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "untied-biased-gelu": {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "hidden_activation": "gelu",
            "rms_norm_eps": 1e-2,
        },
        "full": {"layer_types": ["full_attention"] * 4},
        "sliding-yarn": {
            **rope("yarn", factor=4.0, original_max_position_embeddings=16),
            "layer_types": ["sliding_attention"] * 4,
        },
    }
    refused = [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True has no counterpart"),
        ({"hidden_activation": "mish"}, "unknown hidden_activation 'mish'"),
        (rope("default", partial_rotary_factor=0.5), "which Gemma2ForCausalLM does not follow"),
        ({"sliding_window": None}, "layer_types has sliding_attention, which needs a window"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0; it must be positive"),
    ]

    @pytest.mark.parametrize("implementation", ["eager"])
    def test_same_logits(self, case: dict[str, Any], implementation: str) -> None:
        """transformers has no soft-caps in sdpa, and refuses it for Gemma 2."""
        super().test_same_logits(case, implementation)

    def test_caps_change_the_logits(self) -> None:
        with torch.no_grad():
            logits = [self.build(**case)(tokens()).logits for case in self.cases.values()][:3]
        assert logits[1].abs().max() < 1.5
        assert not torch.allclose(logits[0], logits[2], atol=1e-4)
