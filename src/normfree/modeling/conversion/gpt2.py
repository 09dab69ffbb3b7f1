"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from normfree.modeling.conversion.family import (
    Options,
    Weights,
    activation_name,
    converts,
    renamed,
    require,
    shared_options,
    split_fused,
)

NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.wpe.": "model.embed_positions.",
    "transformer.h.": "model.blocks.",
    "transformer.ln_f.": "model.final_norm.",
    ".ln_1.": ".attention_norm.",
    ".ln_2.": ".ffn_norm.",
    ".attn.c_attn.": ".attention.qkv_proj.",
    ".attn.c_proj.": ".attention.o_proj.",
    ".mlp.c_fc.": ".ffn.up_proj.",
    ".mlp.c_proj.": ".ffn.down_proj.",
}


@converts("gpt2", "GPT2LMHeadModel")
def convert_gpt2(model: Any) -> tuple[Options, Weights]:
    """The projections hold W with shape [in, out], and one fused W_qkv."""
    hf = model.config
    require(
        hf,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
    )
    options = {
        **shared_options(model),
        "n_inner": hf.n_inner,
        "norm_eps": hf.layer_norm_epsilon,
        "activation": activation_name(hf, "activation_function"),
        "scale_residual_init": True,
        "embedding_dropout": hf.embd_pdrop,
        "attention_dropout": hf.attn_pdrop,
        "residual_dropout": hf.resid_pdrop,
    }
    weights = {
        name: tensor.T if name.endswith("_proj.weight") else tensor for name, tensor in renamed(model, NAMES).items()
    }
    return options, split_fused(weights, lambda fused: list(fused.chunk(3)))
