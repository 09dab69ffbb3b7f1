"""Llama: rotary positions, RMSNorm, a gated feed-forward network; biases on every projection of a sublayer or none."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from normfree.modeling import NormfreeConfig
from normfree.removal.stock.harmless import (
    EPSILON,
    STOCK_ACTIVATIONS,
    Weights,
    check_options,
    harmless_norm,
    linear,
    qkv,
    shared_options,
)

CARRIED = ("attention_bias", "mlp_bias", "attention_dropout", "rope_parameters")


def llama_model(config: NormfreeConfig) -> LlamaForCausalLM:
    """An untrained Llama of the sizes and options of ``config``.

    Raises:
        InputError: an option has no counterpart.
    """
    required: dict[str, Any] = {"position": "rotary", "norm_is_centered": False, "ffn": "gated"}
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        required["rope_parameters"] = {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0}
    check_options(config, "Llama", required, CARRIED)
    assert isinstance(config.activation, str), "checked"
    return LlamaForCausalLM(
        LlamaConfig(
            **shared_options(config),
            intermediate_size=config.n_inner,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim,
            hidden_act=STOCK_ACTIVATIONS[config.activation],
            rms_norm_eps=EPSILON,
            rope_parameters=deepcopy(config.rope_parameters),
            attention_bias=config.attention_bias != "none",
            mlp_bias=config.mlp_bias,
            attention_dropout=config.attention_dropout,
        )
    )


def llama_weights(weights: Weights, config: NormfreeConfig) -> Weights:
    """``weights``, float64, under Llama's names."""
    stock = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        **harmless_norm(weights, "model.final_norm", "model.norm"),
    }
    for layer in range(config.n_layer):
        block, theirs = f"model.blocks.{layer}", f"model.layers.{layer}"
        stock |= harmless_norm(weights, f"{block}.attention_norm", f"{theirs}.input_layernorm")
        stock |= harmless_norm(weights, f"{block}.ffn_norm", f"{theirs}.post_attention_layernorm")
        projections = {f"self_attn.{each}_proj": values for each, values in qkv(weights, block).items()}
        projections["self_attn.o_proj"] = linear(weights, f"{block}.attention.o_proj")
        projections |= {
            f"mlp.{each}_proj": linear(weights, f"{block}.ffn.{each}_proj") for each in ("gate", "up", "down")
        }
        for name, (weight, bias) in projections.items():
            stock[f"{theirs}.{name}.weight"] = weight
            if config.mlp_bias if name.startswith("mlp.") else config.attention_bias != "none":
                stock[f"{theirs}.{name}.bias"] = bias
    return stock
