"""A model with constant stds as a stock model of transformers, whose norms have no effect.

A norm becomes x / sqrt(var(x) + ε) ⊙ gain' with ε = 1e12 and gain' = gain sqrt(ε) / σ ("Transformers Don't Need
LayerNorm at Inference Time", Section 3). It differs from the division by σ by the factor 1 - var(x) / 2ε, which is
less than float32's rounding up to a std of 300.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.conversion import gpt2, gpt_neox, llama
from normfree.modeling.conversion.family import HF_ACTIVATIONS, Weights, renamed
from normfree.removal.fold import FOLDED

EPSILON = 1e12
"""ε of the norms: float32 loses a token's variance in the sum of the two."""
STOCK_ACTIVATIONS = {normfree: stock for stock, normfree in reversed(HF_ACTIVATIONS.items())}
SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    **{name: name for name in ("initializer_range", "tie_word_embeddings", "use_cache")},
    **{name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
}
"""Options of every stock configuration, and Normfree's names for them."""
CENTERED = {"norm_is_centered": True, "final_norm_is_centered": True}
NOT_CENTERED = {"norm_is_centered": False, "final_norm_is_centered": False}
UNCHECKED = {
    *SHARED.values(),
    *("norm_eps", "scale_residual_init"),  # not read by a trained model
    *("n_inner", "activation", *CENTERED, "n_kv_head", "head_dim"),  # checked by families
    "layer_types",  # all are full attention without a sliding_window
}
"""Options that need no counterpart, or that are checked elsewhere."""


@dataclass(frozen=True)
class _Family:
    """A stock architecture.

    names: parts of its parameter names, and Normfree's.
    options: of its configuration.
    required: options of Normfree with the only value that the family can hold.
    carried: options of Normfree that the family has a counterpart of. All others must have their default.
    fuse: makes W_qkv or its bias from those of q, k and v; None if the family has three projections.
    is_transposed: projections hold W with shape [in, out].
    """

    name: str
    model: type[PreTrainedModel]
    config: type[Any]
    names: dict[str, str]
    options: dict[str, Any]
    required: dict[str, Any]
    carried: tuple[str, ...]
    fuse: Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    is_transposed: bool = False


@torch.no_grad()
def to_stock(model: NormfreeForCausalLM) -> GPT2LMHeadModel | GPTNeoXForCausalLM | LlamaForCausalLM:
    """A stock model of transformers with the logits of ``model``, whose norms all have a constant std.

    Models with learned positions become a ``GPT2LMHeadModel``, those with rotary positions a ``GPTNeoXForCausalLM``
    (dense feed-forward network) or a ``LlamaForCausalLM`` (gated). Norms lose their effect (see the module). If values
    have another σ than queries and keys, their weights take in the difference. For a model without any norm op use
    :func:`normfree.remove_norms`.

    Args:
        model: its ``norm`` and ``final_norm`` are ``constant_std``, as in the checkpoints of a finished removal; it is
            not changed.

    Returns:
        A model of the same dtype (not float16), on the same device, in the same mode. Weights are computed in float64.

    Raises:
        InputError: the model has other norms, an option that the stock architecture has no counterpart for, or
            float16 weights.
    """
    if model.dtype == torch.float16:
        raise InputError("float16 cannot hold the gains of about 1e6; convert the model to float32 or bfloat16 first")
    config = model.config
    declare = _gpt2 if config.position == "learned" else _llama if config.ffn == "gated" else _neox
    family = declare(config)
    _check_options(config, family)
    shared = {stock_name: getattr(config, name) for stock_name, name in SHARED.items()}
    stock: Any = family.model(family.config(**shared, **family.options))
    weights = _weights(model, family)
    state = {}
    for stock_name, (name, tensor) in zip(stock.state_dict(), renamed(stock, family.names).items(), strict=True):
        weight = weights.get(name, torch.zeros_like(tensor) if name.endswith(".bias") else None)
        assert weight is not None, name
        state[stock_name] = weight.T if family.is_transposed and name.endswith("_proj.weight") else weight
    stock.load_state_dict(state)
    stock.generation_config = model.generation_config
    return stock.to(device=model.device, dtype=model.dtype).train(model.training)


def _gpt2(config: NormfreeConfig) -> _Family:
    return _Family(
        "GPT-2",
        GPT2LMHeadModel,
        GPT2Config,
        gpt2.NAMES,
        options={
            "n_inner": config.n_inner,
            "activation_function": _activation(config),
            "layer_norm_epsilon": EPSILON,
            "embd_pdrop": config.embedding_dropout,
            "attn_pdrop": config.attention_dropout,
            "resid_pdrop": config.residual_dropout,
        },
        required={**CENTERED, **_equal_heads(config)},
        carried=("attention_bias", "mlp_bias", "embedding_dropout", "attention_dropout", "residual_dropout"),
        fuse=torch.cat,
        is_transposed=True,
    )


def _neox(config: NormfreeConfig) -> _Family:
    def fuse(parts: list[torch.Tensor]) -> torch.Tensor:
        """The query, key and value rows head by head."""
        return torch.stack([part.unflatten(0, (config.n_head, -1)) for part in parts], dim=1).flatten(0, 2)

    carried = ("attention_bias", "mlp_bias", "attention_dropout", "residual_dropout")
    return _Family(
        "GPT-NeoX",
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        gpt_neox.NAMES,
        options={
            "intermediate_size": config.n_inner,
            "hidden_act": _activation(config),
            "layer_norm_eps": EPSILON,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": True,
            "rope_parameters": deepcopy(config.rope_parameters),
            "hidden_dropout": config.residual_dropout,
            "attention_dropout": config.attention_dropout,
        },
        required={
            "position": "rotary",
            **CENTERED,
            **_equal_heads(config),
            "embedding_dropout": config.residual_dropout,  # GPT-NeoX has one rate for both
        },
        carried=(*carried, "parallel_residual", "rope_parameters"),
        fuse=fuse,
    )


def _llama(config: NormfreeConfig) -> _Family:
    rotary = config.rope_parameters or {}
    rotates_parts = rotary.get("partial_rotary_factor", 1.0) != 1.0
    return _Family(
        "Llama",
        LlamaForCausalLM,
        LlamaConfig,
        llama.LLAMA_NAMES,
        options={
            "intermediate_size": config.n_inner,
            "num_key_value_heads": config.n_kv_head,
            "head_dim": config.head_dim,
            "hidden_act": _activation(config),
            "rms_norm_eps": EPSILON,
            "rope_parameters": deepcopy(config.rope_parameters),
            "attention_bias": config.attention_bias != "none",
            "mlp_bias": config.mlp_bias,
            "attention_dropout": config.attention_dropout,
        },
        required={
            "position": "rotary",
            **NOT_CENTERED,
            "ffn": "gated",
            **({"rope_parameters": {**rotary, "partial_rotary_factor": 1.0}} if rotates_parts else {}),
        },
        carried=("attention_bias", "mlp_bias", "attention_dropout", "rope_parameters"),
    )


def _activation(config: NormfreeConfig) -> str | None:
    return STOCK_ACTIVATIONS.get(config.activation) if isinstance(config.activation, str) else None


def _equal_heads(config: NormfreeConfig) -> dict[str, int]:
    return {"n_kv_head": config.n_head, "head_dim": config.n_embd // config.n_head}


def _check_options(config: NormfreeConfig, family: _Family) -> None:
    default = NormfreeConfig.from_options({"n_layer": config.n_layer})
    free = UNCHECKED | set(family.carried)
    wanted = {name: getattr(default, name) for name in NormfreeConfig.option_names() if name not in free}
    wanted |= {"norm": FOLDED, "final_norm": FOLDED, **family.required}
    for option, value in wanted.items():
        if getattr(config, option) != value:
            raise InputError(
                f"{option} = {getattr(config, option)!r} has no counterpart in {family.name}; only {value!r} can be "
                "exported"
            )
    if _activation(config) is None:
        raise InputError(
            f"activation {config.activation!r} has no counterpart in {family.name}; allowed, for all layers: "
            f"{', '.join(STOCK_ACTIVATIONS)}"
        )


def _weights(model: NormfreeForCausalLM, family: _Family) -> Weights:
    """The weights under Normfree's names, float64: norms without effect, q, k and v fused if the family's are.

    Values read r (y - bias) + bias in place of the norm's output y for queries and keys, with r = σ_qk / σ_v. v_proj
    takes in the difference.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        attention, norm = f"model.blocks.{layer}.attention", f"model.blocks.{layer}.attention_norm"
        std_qk, std_v = weights[f"{norm}.std"]
        ratio, values = std_qk / std_v, weights[f"{attention}.v_proj.weight"]
        biases = [weights.get(f"{attention}.{each}_proj.bias") for each in "qkv"]
        if f"{norm}.bias" in weights:
            shift = (1 - ratio) * (values @ weights[f"{norm}.bias"])
            biases[2] = shift if biases[2] is None else biases[2] + shift
        weights[f"{attention}.v_proj.weight"] = ratio * values
        maps = [weights[f"{attention}.{each}_proj.weight"] for each in "qkv"]
        filled = [each.new_zeros(len(each)) if bias is None else bias for each, bias in zip(maps, biases, strict=True)]
        if family.fuse is not None:
            weights[f"{attention}.qkv_proj.weight"] = family.fuse(maps)
            weights[f"{attention}.qkv_proj.bias"] = family.fuse(filled)
        weights |= {f"{attention}.{each}_proj.bias": bias for each, bias in zip("qkv", filled, strict=True)}
    for name in [name for name in weights if name.endswith("_norm.std")]:
        gain = f"{name.removesuffix('.std')}.weight"
        weights[gain] = weights[gain] * (sqrt(EPSILON) / weights[name][0])
    return weights
