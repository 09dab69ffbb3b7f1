"""A removed GPT-2 for tools that know only the stock architecture: its LayerNorms stay, and do nothing."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.conversion.options import HF_ACTIVATIONS
from normfree.removal.fold import FOLDED

EPSILON = 1e12
"""ε of the LayerNorms: so large that the variance of a token beside it is lost in float32's rounding."""
GPT2_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}


@torch.no_grad()
def to_gpt2(model: NormfreeForCausalLM) -> GPT2LMHeadModel:
    """A stock ``GPT2LMHeadModel`` with the logits of ``model``, whose norms all have a constant std.

    Each LayerNorm becomes (x - mean(x)) / sqrt(var(x) + ε) ⊙ gain' + bias with ε = 1e12 and gain' = gain sqrt(ε) / σ,
    which differs from the division by σ by var(x) / 2ε: less than float32's rounding up to a std of 300. The gains are
    about 1e6, so float16 cannot hold them. Where the values have another σ than the queries and keys, the difference is
    in their weights. For a model without any norm op take :func:`normfree.remove_norms`.

    Raises:
        InputError: the model has other norms, or an option that GPT-2 has no counterpart for.
    """
    config = model.config
    required = {
        "norm": FOLDED,
        "final_norm": FOLDED,
        "norm_is_centered": True,
        "parallel_residual": False,
        "qk_norm": "none",
        "sliding_window": None,
        "scale_embeddings": False,
        "embedding_multiplier": None,
        "attention_scale": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "positions_skip_padding": False,
        "ffn": "dense",
        "position": "learned",
        "attention": "softmax",
        "n_kv_head": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "lm_head_bias": False,
    }
    for option, value in required.items():
        if getattr(config, option) != value:
            raise InputError(
                f"{option} = {getattr(config, option)!r} has no counterpart in GPT-2; only {value!r} can be exported"
            )
    if not isinstance(config.activation, str) or config.activation not in GPT2_ACTIVATIONS:
        allowed = ", ".join(GPT2_ACTIVATIONS)
        raise InputError(
            f"activation {config.activation!r} has no counterpart in GPT-2; allowed, for all layers: {allowed}"
        )
    if model.dtype == torch.float16:
        raise InputError("float16 cannot hold the gains of about 1e6; convert the model to float32 or bfloat16 first")
    exported: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.n_inner,
            activation_function=GPT2_ACTIVATIONS[config.activation],
            layer_norm_epsilon=EPSILON,
            embd_pdrop=config.embedding_dropout,
            attn_pdrop=config.attention_dropout,
            resid_pdrop=config.residual_dropout,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    ours = {name: tensor.double() for name, tensor in model.state_dict().items()}
    weights = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"],
        "transformer.wpe.weight": ours["model.embed_positions.weight"],
        "lm_head.weight": ours["lm_head.weight"],
        **_norm(ours, "model.final_norm", "transformer.ln_f"),
    }
    for layer in range(config.n_layer):
        block, theirs = f"model.blocks.{layer}", f"transformer.h.{layer}"
        weights |= _norm(ours, f"{block}.attention_norm", f"{theirs}.ln_1")
        weights |= _norm(ours, f"{block}.ffn_norm", f"{theirs}.ln_2")
        weights |= _qkv(ours, block, f"{theirs}.attn.c_attn")
        for name, of_theirs in (
            ("attention.o_proj", "attn.c_proj"),
            ("ffn.up_proj", "mlp.c_fc"),
            ("ffn.down_proj", "mlp.c_proj"),
        ):
            weight, bias = _linear(ours, f"{block}.{name}")
            weights |= {f"{theirs}.{of_theirs}.weight": weight.T, f"{theirs}.{of_theirs}.bias": bias}
    exported.load_state_dict(weights)
    exported.generation_config = model.generation_config
    plain: GPT2LMHeadModel = exported.to(device=model.device, dtype=model.dtype)
    return plain.train(model.training)


def _linear(ours: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight = ours[f"{name}.weight"]
    bias = ours.get(f"{name}.bias")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _norm(ours: dict[str, torch.Tensor], name: str, theirs: str) -> dict[str, torch.Tensor]:
    gain = ours[f"{name}.weight"] * (sqrt(EPSILON) / ours[f"{name}.std"][0])
    return {f"{theirs}.weight": gain, f"{theirs}.bias": ours[f"{name}.bias"]}


def _qkv(ours: dict[str, torch.Tensor], block: str, theirs: str) -> dict[str, torch.Tensor]:
    """The three projections in one. What reaches the values is y of the queries: r (y - bias) + bias is what should."""
    projections = {each: _linear(ours, f"{block}.attention.{each}_proj") for each in "qkv"}
    std_qk, std_v = ours[f"{block}.attention_norm.std"]
    ratio = std_qk / std_v
    weight, bias = projections["v"]
    projections["v"] = (ratio * weight, bias + (1 - ratio) * (weight @ ours[f"{block}.attention_norm.bias"]))
    weights, biases = zip(*projections.values(), strict=True)
    return {f"{theirs}.weight": torch.cat(weights).T, f"{theirs}.bias": torch.cat(biases)}
