"""GPT-NeoX and Pythia (Black et al. 2022)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from normfree.modeling.conversion.family import (
    Options,
    Weights,
    activation_name,
    converts,
    renamed,
    shared_options,
    split_fused,
)

NAMES = {
    "gpt_neox.embed_in.": "model.embed_tokens.",
    "gpt_neox.layers.": "model.blocks.",
    "gpt_neox.final_layer_norm.": "model.final_norm.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".attention.query_key_value.": ".attention.qkv_proj.",
    ".attention.dense.": ".attention.o_proj.",
    ".mlp.dense_h_to_4h.": ".ffn.up_proj.",
    ".mlp.dense_4h_to_h.": ".ffn.down_proj.",
}


@converts("gpt_neox", "GPTNeoXForCausalLM")
def convert_gpt_neox(model: Any) -> tuple[Options, Weights]:
    """W_qkv holds the query, key and value rows head by head."""
    hf = model.config
    options = {
        **shared_options(model),
        "n_inner": hf.intermediate_size,
        "norm_eps": hf.layer_norm_eps,
        "parallel_residual": hf.use_parallel_residual,
        "activation": activation_name(hf, "hidden_act"),
        "attention_bias": hf.attention_bias,
        "position": "rotary",
        "rope_parameters": deepcopy(hf.rope_parameters),
        "embedding_dropout": hf.hidden_dropout,
        "attention_dropout": hf.attention_dropout,
        "residual_dropout": hf.hidden_dropout,
    }

    def split(fused: torch.Tensor) -> list[torch.Tensor]:
        by_head = fused.reshape(hf.num_attention_heads, 3, -1, *fused.shape[1:])
        return [part.flatten(0, 1) for part in by_head.unbind(1)]

    return options, split_fused(renamed(model, NAMES), split)
