"""GPT-2: learned positions, LayerNorm, a dense feed-forward network, biases everywhere."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

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

CARRIED = ("attention_bias", "mlp_bias", "embedding_dropout", "attention_dropout", "residual_dropout")


def gpt2_model(config: NormfreeConfig) -> GPT2LMHeadModel:
    """An untrained GPT-2 of the sizes and options of ``config``.

    Raises:
        InputError: an option has no counterpart.
    """
    required = {
        "norm_is_centered": True,
        "n_kv_head": config.n_head,
        "head_dim": config.n_embd // config.n_head,
    }
    check_options(config, "GPT-2", required, CARRIED)
    assert isinstance(config.activation, str), "checked"
    return GPT2LMHeadModel(
        GPT2Config(
            **shared_options(config),
            n_inner=config.n_inner,
            activation_function=STOCK_ACTIVATIONS[config.activation],
            layer_norm_epsilon=EPSILON,
            embd_pdrop=config.embedding_dropout,
            attn_pdrop=config.attention_dropout,
            resid_pdrop=config.residual_dropout,
        )
    )


def gpt2_weights(weights: Weights, config: NormfreeConfig) -> Weights:
    """``weights``, float64, under GPT-2's names; its projections hold W with shape [in, out]."""
    stock = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.wpe.weight": weights["model.embed_positions.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        **harmless_norm(weights, "model.final_norm", "transformer.ln_f"),
    }
    for layer in range(config.n_layer):
        block, theirs = f"model.blocks.{layer}", f"transformer.h.{layer}"
        stock |= harmless_norm(weights, f"{block}.attention_norm", f"{theirs}.ln_1")
        stock |= harmless_norm(weights, f"{block}.ffn_norm", f"{theirs}.ln_2")
        fused, biases = zip(*qkv(weights, block).values(), strict=True)
        stock |= {f"{theirs}.attn.c_attn.weight": torch.cat(fused).T, f"{theirs}.attn.c_attn.bias": torch.cat(biases)}
        for name, stock_name in (
            ("attention.o_proj", "attn.c_proj"),
            ("ffn.up_proj", "mlp.c_fc"),
            ("ffn.down_proj", "mlp.c_proj"),
        ):
            weight, bias = linear(weights, f"{block}.{name}")
            stock |= {f"{theirs}.{stock_name}.weight": weight.T, f"{theirs}.{stock_name}.bias": bias}
    return stock
