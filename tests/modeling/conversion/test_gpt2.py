"""GPT-2 and ``from_hf`` of it."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel

from tests.modeling.conversion.checks import VOCAB, FamilyChecks


class TestGPT2(FamilyChecks):
    model_class = GPT2LMHeadModel
    config_class = GPT2Config
    sizes = {
        "vocab_size": VOCAB,
        "n_positions": 24,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    cases = {
        "": {},
        "untied-relu-wide": {
            "tie_word_embeddings": False,
            "activation_function": "relu",
            "n_inner": 24,
            "layer_norm_epsilon": 1e-2,
        },
        "one-head": {"n_head": 1, "n_layer": 1, "activation_function": "gelu"},
    }
    refused = [
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"activation_function": "quick_gelu"}, "unknown activation_function 'quick_gelu'"),
        ({"resid_pdrop": 1.0}, r"residual_dropout is 1\.0"),
    ]
    dropouts = ({"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}, (0.1, 0.2, 0.3))
