"""What the families share: a norm that does nothing, projections in float64, and options without a counterpart.

A norm becomes x / sqrt(var(x) + ε) ⊙ gain' with ε = 1e12 and gain' = gain sqrt(ε) / σ. It differs from the division by
σ by var(x) / 2ε, which is less than float32's rounding up to a std of 300.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.modeling.conversion.family import HF_ACTIVATIONS
from normfree.removal.fold import FOLDED

EPSILON = 1e12
"""ε of the norms: so large that float32 loses the variance of a token in the sum of the two."""
STOCK_ACTIVATIONS = {normfree: stock for stock, normfree in reversed(HF_ACTIVATIONS.items())}
SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner")
NOT_THE_FUNCTION = (
    "norm_eps",
    "initializer_range",
    "scale_residual_init",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "norm_is_centered",
    "n_kv_head",
    "head_dim",
    "layer_types",  # all are full attention without a sliding_window
)
"""Options that every stock model has too, that a family checks itself, or that a trained model no longer reads."""

Weights = dict[str, torch.Tensor]


def check_options(config: NormfreeConfig, family: str, required: Mapping[str, Any], carried: tuple[str, ...]) -> None:
    """Checks every option of a model against what ``family`` can hold.

    Args:
        required: options with the one value that the family can hold.
        carried: options that the family has a counterpart of. All others must have their default.

    Raises:
        InputError: an option has no counterpart.
    """
    default = NormfreeConfig.from_options({"n_layer": config.n_layer})
    wanted = {
        name: getattr(default, name)
        for name in NormfreeConfig.option_names()
        if name not in (*SIZES, *NOT_THE_FUNCTION, *carried, "activation")
    }
    wanted |= {"norm": FOLDED, "final_norm": FOLDED, **required}
    for option, value in wanted.items():
        if getattr(config, option) != value:
            raise InputError(
                f"{option} = {getattr(config, option)!r} has no counterpart in {family}; only {value!r} can be exported"
            )
    if not isinstance(config.activation, str) or config.activation not in STOCK_ACTIVATIONS:
        allowed = ", ".join(STOCK_ACTIVATIONS)
        raise InputError(
            f"activation {config.activation!r} has no counterpart in {family}; allowed, for all layers: {allowed}"
        )


def linear(weights: Weights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a projection; a bias that is not there is zero."""
    weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def harmless_norm(weights: Weights, name: str, stock_name: str) -> Weights:
    """The stock norm that stands for a constant std, that of its first reader."""
    norm = {f"{stock_name}.weight": weights[f"{name}.weight"] * (sqrt(EPSILON) / weights[f"{name}.std"][0])}
    if f"{name}.bias" in weights:
        norm[f"{stock_name}.bias"] = weights[f"{name}.bias"]
    return norm


def qkv(weights: Weights, block: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of q, k and v behind one norm, that of the queries and keys.

    Values read r (y - bias) + bias in place of that norm's result y, with r = σ_qk / σ_v. The difference goes into
    their projection.
    """
    projections = {each: linear(weights, f"{block}.attention.{each}_proj") for each in "qkv"}
    std_qk, std_v = weights[f"{block}.attention_norm.std"]
    ratio = std_qk / std_v
    weight, bias = projections["v"]
    norm_bias = weights.get(f"{block}.attention_norm.bias")
    if norm_bias is not None:
        bias = bias + (1 - ratio) * (weight @ norm_bias)
    projections["v"] = (ratio * weight, bias)
    return projections


def shared_options(config: NormfreeConfig) -> dict[str, Any]:
    """Options under the names that all stock configurations understand."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
