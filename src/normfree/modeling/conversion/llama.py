"""Llama (Touvron et al. 2023; grouped queries and scaled rotary frequencies from later versions) and its relatives."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from normfree.errors import InputError
from normfree.modeling.conversion.family import Options, Weights, activation_name, converts, renamed, shared_options

LLAMA_NAMES = {
    "model.layers.": "model.blocks.",
    "model.norm.": "model.final_norm.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.": ".attention.",
    ".mlp.": ".ffn.",
}
"""Parts of Llama's parameter names and Normfree's names for them."""


@converts("llama", "LlamaForCausalLM")
def convert_llama(model: Any) -> tuple[Options, Weights]:
    """Llama has one option that its relatives lack: the bias of the feed-forward network."""
    return converted_llama(model, mlp_bias=model.config.mlp_bias)


def converted_llama(model: Any, names: dict[str, str] = LLAMA_NAMES, **options: Any) -> tuple[Options, Weights]:
    """A model of Llama's architecture; ``options`` of Normfree's configuration replace those of Llama."""
    check_whole_heads_rotate(model)
    return {**llama_options(model), **options}, renamed(model, names)


def llama_options(model: Any, activation: str = "hidden_act") -> Options:
    """The options that Llama's relatives share; some have no ``head_dim``, ``attention_bias`` or ``rms_norm_eps``.

    ``activation`` is the name of the option that names the activation.
    """
    hf = model.config
    return {
        **shared_options(model),
        "n_kv_head": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None),
        "n_inner": hf.intermediate_size,
        "norm": "rmsnorm",
        "final_norm": "rmsnorm",
        "norm_eps": getattr(hf, "rms_norm_eps", None),
        "ffn": "gated",
        "activation": activation_name(hf, activation),
        "attention_bias": getattr(hf, "attention_bias", False),
        "mlp_bias": False,
        "position": "rotary",
        "rope_parameters": deepcopy(hf.rope_parameters),
        "attention_dropout": hf.attention_dropout or 0.0,
    }


def check_whole_heads_rotate(model: Any, *parameter_sets: Options) -> None:
    """Checks rotary parameters of a class that rotates whole heads in any case; by default the configuration's.

    Raises:
        InputError: the configuration names a part of each head.
    """
    for parameters in parameter_sets or (model.config.rope_parameters,):
        rotated = parameters.get("partial_rotary_factor", 1.0)
        if rotated != 1.0:
            raise InputError(
                f"from_hf: rope_parameters has partial_rotary_factor = {rotated}, which {type(model).__name__} does "
                "not follow: it rotates whole heads; only 1.0 can be converted"
            )
