"""Gemma 3 and ``from_hf`` of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from normfree import from_hf
from normfree.errors import InputError
from normfree.modeling.rotary import RotaryByLayerType
from tests.modeling.conversion.checks import assert_same, perturbed, tokens
from tests.modeling.conversion.test_gemma2 import SIZES, GemmaChecks

MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def ropes(**of_full: Any) -> dict[str, Any]:
    return {
        "layer_types": MIXED,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0, **of_full},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    }


class TestGemma3(GemmaChecks):
    model_class = Gemma3ForCausalLM
    config_class = Gemma3TextConfig
    cases = {
        "": {},  # the pattern of six makes all four layers sliding
        "mixed": {"layer_types": MIXED},
        "mixed-linear": ropes(rope_type="linear", factor=8.0),
        "mixed-dynamic": {**ropes(rope_type="dynamic", factor=4.0), "max_position_embeddings": 8},
        "mixed-longrope": ropes(
            rope_type="longrope",
            factor=4.0,
            original_max_position_embeddings=8,
            short_factor=[1.0, 1.2, 1.5, 2.0, 2.5, 3.0],
            long_factor=[2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
        ),
        "capped-untied-biased": {
            "layer_types": MIXED,
            "final_logit_softcapping": 1.5,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
        "full": {"layer_types": ["full_attention"] * 4, "rms_norm_eps": 1e-2},
    }
    refused = [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True has no counterpart"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, which Gemma3ForCausalLM does not follow"),
        (ropes(partial_rotary_factor=0.5), "which Gemma3ForCausalLM does not follow"),
        ({"hidden_activation": "mish"}, "unknown hidden_activation 'mish'"),
    ]

    @torch.no_grad()
    def test_each_kind_of_layer_has_its_frequencies(self) -> None:
        theirs = self.build(**ropes())
        ours = from_hf(theirs)
        rotary = ours.model.rotary_embedding
        assert isinstance(rotary, RotaryByLayerType)
        for kind, theta in (("full_attention", 500.0), ("sliding_attention", 20.0)):
            expected = theta ** -(torch.arange(0, 12, 2) / 12)
            torch.testing.assert_close(rotary[kind].inv_freq, expected)
        assert not torch.allclose(
            theirs(tokens()).logits, self.build(**ropes(rope_theta=20.0))(tokens()).logits, atol=1e-3
        )

    @torch.no_grad()
    def test_same_logits_in_the_attention_interface_of_flex(self) -> None:
        theirs = self.build(**self.cases["mixed"])
        expected = theirs(tokens()).logits
        ours = from_hf(theirs)
        ours.set_attn_implementation("flex_attention")
        with torch.compiler.set_stance("force_eager"):
            assert_same(ours(tokens()).logits, expected)


@torch.no_grad()
def test_of_a_model_that_sees_images_the_text_part_is_converted() -> None:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    sizes: dict[str, Any] = {**SIZES, "layer_types": MIXED}
    text_config = Gemma3TextConfig(**sizes)
    config = Gemma3Config(text_config=text_config, vision_config=vision, mm_tokens_per_image=4)
    model = perturbed(Gemma3ForConditionalGeneration(config))
    with pytest.raises(InputError, match=r"cannot convert a Gemma3ForConditionalGeneration; allowed: .*Gemma3ForC"):
        from_hf(model)
    text = Gemma3ForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    assert_same(from_hf(text.eval())(tokens()).logits, model(tokens()).logits)
