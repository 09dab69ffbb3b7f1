"""GPT-NeoX and ``from_hf`` of it."""

from __future__ import annotations

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.modeling.conversion.checks import VOCAB, FamilyChecks, rope


class TestGPTNeoX(FamilyChecks):
    model_class = GPTNeoXForCausalLM
    config_class = GPTNeoXConfig
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
    }
    cases = {
        "": {},
        "sequential": {"use_parallel_residual": False, "layer_norm_eps": 1e-2},
        "full-rotary-no-bias": {
            **rope("default", partial_rotary_factor=1.0),
            "attention_bias": False,
            "hidden_act": "gelu_fast",
        },
        "tied-linear": {
            **rope("linear", factor=4.0, partial_rotary_factor=0.5),
            "tie_word_embeddings": True,
        },
    }
    refused = [({"hidden_act": "mish"}, "unknown hidden_act 'mish'")]
    dropouts = ({"hidden_dropout": 0.1, "attention_dropout": 0.2}, (0.1, 0.2, 0.1))
