"""OPT and ``from_hf`` of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from normfree import from_hf
from normfree.errors import InputError
from tests.modeling.conversion.checks import VOCAB, FamilyChecks, assert_same, padding_mask, tokens

NARROW: dict[str, Any] = {"word_embed_proj_dim": 12}
POST = {"do_layer_norm_before": False}


def layer_dropout_draws() -> bool:
    """True for transformers below 5.24, which draw a number for the dropout of each layer also where there is none."""
    model = OPTForCausalLM(OPTConfig(**TestOPT.sizes, layerdrop=0.0)).train()
    before = torch.get_rng_state()
    model(tokens())
    return not torch.equal(torch.get_rng_state(), before)


class TestOPT(FamilyChecks):
    model_class = OPTForCausalLM
    config_class = OPTConfig
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "ffn_dim": 48,
        "max_position_embeddings": 24,
        "num_attention_heads": 4,
        "dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    cases = {
        "": {},
        "untied-gelu": {"tie_word_embeddings": False, "activation_function": "gelu"},
        "post": POST,
        "without-final-norm": {"_remove_final_layer_norm": True},
        "without-biases": {"enable_bias": False},
        "plain-norms": {"layer_norm_elementwise_affine": False},
        "plain-post-norms": {"layer_norm_elementwise_affine": False, **POST},
        "narrow": NARROW,
        "narrow-untied-post": {**NARROW, **POST, "tie_word_embeddings": False},
    }
    refused = [
        ({"layerdrop": 0.1}, "layerdrop = 0.1 has no counterpart; only 0.0 can be converted"),
        ({"activation_function": "quick_gelu"}, "unknown activation_function 'quick_gelu'"),
    ]
    kept_options = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
    dropouts = ({"dropout": 0.3, "attention_dropout": 0.2}, (0.0, 0.2, 0.3))

    def test_dropouts_act_in_the_same_places(self) -> None:
        if layer_dropout_draws():
            pytest.skip("this transformers draws a number for each layer's dropout, so the masks differ")
        super().test_dropouts_act_in_the_same_places()

    def test_weights_are_copies_and_complete(self, case: dict[str, Any]) -> None:
        theirs = self.build(**case)
        ours = from_hf(theirs)
        storages = {p.untyped_storage().data_ptr() for p in theirs.parameters()}
        assert not storages & {p.untyped_storage().data_ptr() for p in ours.parameters()}
        assert ours.config.initializer_range == theirs.config.init_std
        positions = theirs.model.decoder.embed_positions
        assert torch.equal(ours.model.embed_positions.weight, positions.weight[positions.offset :])
        tied = ours.lm_head.weight is ours.model.embed_tokens.weight
        assert tied == ours.config.tie_word_embeddings
        assert tied == (theirs.config.tie_word_embeddings and "word_embed_proj_dim" not in case)

    def test_same_loss_and_gradients(self, case: dict[str, Any]) -> None:
        if "word_embed_proj_dim" not in case:
            super().test_same_loss_and_gradients(case)
            return
        theirs = self.build(**case)
        loss = from_hf(theirs)(tokens(), labels=tokens()).loss
        torch.testing.assert_close(loss, theirs(tokens(), labels=tokens()).loss, rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_positions_count_tokens_wherever_padding_is(self) -> None:
        theirs = self.build()
        ours = from_hf(theirs)
        hole = padding_mask("left")
        hole[0, 4:6] = 0
        kept = hole.bool()
        assert_same(
            ours(tokens(), attention_mask=hole).logits[kept], theirs(tokens(), attention_mask=hole).logits[kept]
        )
        positions = torch.arange(12).expand(3, -1) + 7
        assert_same(
            ours(tokens(), position_ids=positions).logits,
            theirs(tokens(), position_ids=positions, attention_mask=torch.ones(3, 12)).logits,
        )

    def test_products_that_half_precision_would_round_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"bfloat16 cannot hold the result.*from_hf\(model\.float\(\)\)"):
            from_hf(self.build(**NARROW).to(torch.bfloat16))
