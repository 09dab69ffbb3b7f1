"""OPT (Zhang et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch

from normfree.modeling.conversion.family import (
    Options,
    Weights,
    activation_name,
    computed,
    converts,
    renamed,
    require,
    shared_options,
)

POSITION_OFFSET = 2
"""Rows of OPT's table of positions before that of position 0; no token reads them."""

NAMES = {
    "model.decoder.embed_": "model.embed_",
    "model.decoder.layers.": "model.blocks.",
    "model.decoder.final_layer_norm.": "model.final_norm.",
    "model.decoder.project_": "project_",
    ".self_attn_layer_norm.": ".attention_norm.",
    ".final_layer_norm.": ".ffn_norm.",
    ".self_attn.": ".attention.",
    ".out_proj.": ".o_proj.",
    ".fc1.": ".ffn.up_proj.",
    ".fc2.": ".ffn.down_proj.",
}


@converts("opt", "OPTForCausalLM")
def convert_opt(model: Any) -> tuple[Options, Weights]:
    """Post-norm without ``do_layer_norm_before``; positions count the tokens of the attention mask.

    Where embeddings are narrower than the residual stream (``word_embed_proj_dim``), the two projections between them
    are multiplied into the embedding and the unembedding, which are then untied.
    """
    hf = model.config
    require(hf, layerdrop=0.0)
    is_pre_norm = hf.do_layer_norm_before
    has_final_norm = is_pre_norm and not hf._remove_final_layer_norm
    weights = renamed(model, NAMES)
    is_projected = _multiply_projections(weights)
    shared = shared_options(model)
    options = {
        **shared,
        "initializer_range": hf.init_std,
        "tie_word_embeddings": shared["tie_word_embeddings"] and not is_projected,
        "n_inner": hf.ffn_dim,
        "norm_placement": "pre" if is_pre_norm else "post",
        "final_norm": "layernorm" if has_final_norm else "none",
        "norm_eps": 1e-5,
        "activation": activation_name(hf, "activation_function"),
        "attention_bias": hf.enable_bias,
        "mlp_bias": hf.enable_bias,
        "positions_skip_padding": True,
        "attention_dropout": hf.attention_dropout,
        "residual_dropout": hf.dropout,
    }
    weights["model.embed_positions.weight"] = weights["model.embed_positions.weight"][POSITION_OFFSET:]
    if not hf.layer_norm_elementwise_affine:
        weights |= _plain_norms(model, has_final_norm)
    return options, weights


def _multiply_projections(weights: Weights) -> bool:
    """Multiplies ``project_in`` and ``project_out`` into the embeddings; whether there are any."""
    if "project_in.weight" not in weights:
        return False
    into, out = weights.pop("project_in.weight").double(), weights.pop("project_out.weight").double()
    for name, projection in (("model.embed_tokens.weight", into.T), ("lm_head.weight", out)):
        weights[name] = computed(name, weights[name].double() @ projection, weights[name].dtype)
    return True


def _plain_norms(model: Any, has_final_norm: bool) -> Weights:
    """Gains of one and biases of zero for norms that have neither."""
    names = [
        f"model.blocks.{layer}.{norm}"
        for layer in range(model.config.num_hidden_layers)
        for norm in ("attention_norm", "ffn_norm")
    ]
    ones = torch.ones(model.config.hidden_size, dtype=model.dtype, device=model.device)
    weights: Weights = {}
    for name in [*names, "model.final_norm"] if has_final_norm else names:
        weights |= {f"{name}.weight": ones, f"{name}.bias": torch.zeros_like(ones)}
    return weights
