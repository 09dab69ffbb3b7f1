"""GPT-NeoX and Pythia: rotary positions, LayerNorm, a dense feed-forward network, biases everywhere."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

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

CARRIED = (
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "residual_dropout",
    "parallel_residual",
    "rope_parameters",
)


def gpt_neox_model(config: NormfreeConfig) -> GPTNeoXForCausalLM:
    """An untrained GPT-NeoX of the sizes and options of ``config``.

    Raises:
        InputError: an option has no counterpart.
    """
    required = {
        "position": "rotary",
        "norm_is_centered": True,
        "n_kv_head": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        # GPT-NeoX has one rate for both.
        "embedding_dropout": config.residual_dropout,
    }
    check_options(config, "GPT-NeoX", required, CARRIED)
    assert isinstance(config.activation, str), "checked"
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **shared_options(config),
            intermediate_size=config.n_inner,
            hidden_act=STOCK_ACTIVATIONS[config.activation],
            layer_norm_eps=EPSILON,
            use_parallel_residual=config.parallel_residual,
            attention_bias=True,
            rope_parameters=deepcopy(config.rope_parameters),
            hidden_dropout=config.residual_dropout,
            attention_dropout=config.attention_dropout,
        )
    )


def gpt_neox_weights(weights: Weights, config: NormfreeConfig) -> Weights:
    """``weights``, float64, under GPT-NeoX's names; W_qkv holds the query, key and value rows head by head."""
    stock = {
        "gpt_neox.embed_in.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        **harmless_norm(weights, "model.final_norm", "gpt_neox.final_layer_norm"),
    }
    for layer in range(config.n_layer):
        block, theirs = f"model.blocks.{layer}", f"gpt_neox.layers.{layer}"
        stock |= harmless_norm(weights, f"{block}.attention_norm", f"{theirs}.input_layernorm")
        stock |= harmless_norm(weights, f"{block}.ffn_norm", f"{theirs}.post_attention_layernorm")
        for place, parts in zip(("weight", "bias"), zip(*qkv(weights, block).values(), strict=True), strict=True):
            by_head = [part.unflatten(0, (config.n_head, -1)) for part in parts]
            stock[f"{theirs}.attention.query_key_value.{place}"] = torch.stack(by_head, dim=1).flatten(0, 2)
        for name, stock_name in (
            ("attention.o_proj", "attention.dense"),
            ("ffn.up_proj", "mlp.dense_h_to_4h"),
            ("ffn.down_proj", "mlp.dense_4h_to_h"),
        ):
            stock[f"{theirs}.{stock_name}.weight"], stock[f"{theirs}.{stock_name}.bias"] = linear(
                weights, f"{block}.{name}"
            )
    return stock
