"""Gemma 2 (Gemma Team 2024), and what Gemma 3 has in common with it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from normfree.errors import InputError
from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.conversion.family import Converted, converts
from normfree.modeling.conversion.llama import check_whole_heads_rotate
from normfree.modeling.conversion.options import activation_name, shared_options, window_options
from normfree.modeling.conversion.weights import computed, renamed

NAMES = {
    "model.layers.": "model.blocks.",
    "model.norm.": "model.final_norm.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".attention_output_norm.",
    ".pre_feedforward_layernorm.": ".ffn_norm.",
    ".post_feedforward_layernorm.": ".ffn_output_norm.",
    ".self_attn.": ".attention.",
    ".mlp.": ".ffn.",
}


@converts("gemma2", "Gemma2ForCausalLM")
def convert_gemma2(model: Any) -> Converted:
    """See :func:`gemma_options` and :func:`gemma_weights`; scores are soft-capped as well as logits."""
    check_whole_heads_rotate(model)
    options = {**gemma_options(model), "attn_logit_softcapping": model.config.attn_logit_softcapping}
    return NormfreeConfig(**options), gemma_weights(model)


def gemma_options(model: Any) -> dict[str, Any]:
    """The options of Gemma 2 and 3: sandwich norms, scaled embeddings, soft-capped logits, sliding and full layers.

    Raises:
        InputError: attention is bidirectional.
    """
    hf = model.config
    if getattr(hf, "use_bidirectional_attention", None):
        raise InputError(
            f"from_hf: use_bidirectional_attention = {hf.use_bidirectional_attention} has no counterpart; only causal "
            "attention can be converted"
        )
    return {
        **shared_options(model),
        "n_kv_head": hf.num_key_value_heads,
        "head_dim": hf.head_dim,
        "n_inner": hf.intermediate_size,
        "norm": "rmsnorm",
        "norm_placement": "sandwich",
        "final_norm": "rmsnorm",
        "norm_eps": hf.rms_norm_eps,
        "ffn": "gated",
        "activation": activation_name("hidden_activation", hf.hidden_activation),
        "attention_bias": hf.attention_bias,
        "mlp_bias": False,
        "attention_scale": hf.query_pre_attn_scalar**-0.5,
        "position": "rotary",
        "rope_parameters": deepcopy(hf.rope_parameters),
        **window_options(hf),
        # The buffer, not sqrt(hidden_size): ``model.to(dtype)`` rounds it.
        "embedding_multiplier": float(model.get_input_embeddings().embed_scale),
        "final_logit_softcapping": hf.final_logit_softcapping,
        "attention_dropout": hf.attention_dropout or 0.0,
    }


def gemma_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights; Gemma's norms multiply by 1 + weight, Normfree's by the gain, which is stored as that sum.

    Raises:
        InputError: the weights are of a half precision that would round the sum.
    """
    weights = renamed(model, NAMES)
    for name, tensor in weights.items():
        if name.endswith("_norm.weight"):
            weights[name] = computed(name, 1 + tensor.double(), tensor.dtype)
    return weights
