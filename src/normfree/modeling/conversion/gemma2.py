"""Gemma 2 (Gemma Team 2024), and what Gemma 3 has in common with it."""

from __future__ import annotations

from typing import Any

from normfree.errors import InputError
from normfree.modeling.conversion.family import Options, Weights, computed, converts, renamed, window_options
from normfree.modeling.conversion.llama import LLAMA_NAMES, check_whole_heads_rotate, llama_options

NAMES = {
    **LLAMA_NAMES,
    ".post_attention_layernorm.": ".attention_output_norm.",
    ".pre_feedforward_layernorm.": ".ffn_norm.",
    ".post_feedforward_layernorm.": ".ffn_output_norm.",
}


@converts("gemma2", "Gemma2ForCausalLM")
def convert_gemma2(model: Any) -> tuple[Options, Weights]:
    """See :func:`gemma_options` and :func:`gemma_weights`; scores are soft-capped as well as logits."""
    check_whole_heads_rotate(model)
    options = {**gemma_options(model), "attn_logit_softcapping": model.config.attn_logit_softcapping}
    return options, gemma_weights(model)


def gemma_options(model: Any) -> Options:
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
        **llama_options(model, "hidden_activation"),
        "norm_placement": "sandwich",
        "attention_scale": hf.query_pre_attn_scalar**-0.5,
        **window_options(hf),
        # The buffer, not sqrt(hidden_size): ``model.to(dtype)`` rounds it.
        "embedding_multiplier": float(model.get_input_embeddings().embed_scale),
        "final_logit_softcapping": hf.final_logit_softcapping,
    }


def gemma_weights(model: Any) -> Weights:
    """The weights; Gemma's norms multiply by 1 + weight, Normfree's by the gain, which is stored as that sum.

    Raises:
        InputError: the weights are of a half precision that would round the sum.
    """
    weights = renamed(model, NAMES)
    for name, tensor in weights.items():
        if name.endswith("_norm.weight"):
            weights[name] = computed(name, 1 + tensor.double(), tensor.dtype)
    return weights
