"""A model with constant stds as a stock model of transformers, whose norms have no effect.

All norms but the final one are folded into weights (:mod:`normfree.removal.fold`), and those of the stock model become
x / sqrt(var(x) + ε) ⊙ sqrt(ε) ("Transformers Don't Need LayerNorm at Inference Time", Section 3). This is x but for the
factor 1 - var(x) / 2ε, which is less than float32's rounding up to a std of 300. The final norm keeps its gain, times
sqrt(ε) / σ.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.constant_std import ConstantStdNorm
from normfree.modeling.conversion import gemma2, gpt2, gpt_neox, llama
from normfree.modeling.conversion.family import HF_ACTIVATIONS, Weights, renamed
from normfree.modeling.layer_types import MASKS
from normfree.modeling.rotary import parameter_sets
from normfree.removal.fold import FOLDED, Affine, folded_maps, without_norms

EPSILON = 2.0**40
"""ε of the norms, about 10¹²: float32 loses a token's variance in the sum of the two, and every dtype holds sqrt(ε)."""
MOST_DIFFERENCE = 1e-3
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
UNCHECKED = {
    *SHARED.values(),
    *("norm_eps", "scale_residual_init"),  # not read by a trained model
    *("n_inner", "activation", "norm_is_centered", "n_kv_head", "head_dim"),  # checked by families
    *("qk_norm", "qk_norm_is_constant"),  # folded, or refused
    "layer_types",  # all are full attention without a sliding_window
}
"""Options that need no counterpart, or that are checked elsewhere."""
FOLDED_ALL = ("norm_placement", "n_post_layer", "attention_scale", "embedding_multiplier")
"""Options of models without LayerNorm that weights take in."""
DECISIVE = ("norm", "final_norm", "norm_placement", "ffn", "attention", "position")
"""Options that decide which others there are: the first that a message names."""
OUTGROWN = ("longrope",)
"""Rotary positions whose frequencies change within a sequence: Normfree rotates cached keys again, as Phi-3."""


@dataclass(frozen=True)
class _Family:
    """A stock architecture.

    names: parts of its parameter names, and Normfree's.
    options: of its configuration.
    required: options of Normfree with the only value that the family can hold.
    carried: options of Normfree that the family has a counterpart of. All others must have their default.
    fuse: makes W_qkv or its bias from those of q, k and v; None if the family has three projections.
    is_transposed: projections hold W with shape [in, out].
    bias_options: options of Normfree, and of the family, that tell which projections have biases; None if all have.
    embedding_scale: fixed factor of the token embeddings.
    gain_offset: what the family's norms add to their gain.
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
    bias_options: tuple[str, ...] | None = None
    embedding_scale: float = 1.0
    gain_offset: float = 0.0


@torch.no_grad()
def to_stock(model: NormfreeForCausalLM) -> PreTrainedModel:
    """A stock model of transformers with the logits of ``model``, whose norms have constant stds or are gone.

    Models with learned positions become a ``GPT2LMHeadModel``, those with rotary positions and a dense feed-forward
    network a ``GPTNeoXForCausalLM``, those with a gated one a ``LlamaForCausalLM``; with sliding windows a
    ``Qwen3ForCausalLM``, with soft-capped scores a ``Gemma2ForCausalLM``, with soft-capped logits or rotary parameters
    by kind of layer a ``Gemma3ForCausalLM``. Norms lose their effect (see the module). For a model without any norm op
    use :func:`normfree.remove_norms`.

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
    family = _family(config)
    _check_options(config, family)
    maps = folded_maps(model, torch.float64, keeps_final_norm=True)
    options = {stock_name: getattr(config, name) for stock_name, name in SHARED.items()}
    options |= family.options | _bias_options(without_norms(config, maps), family)
    ratio = _rounded(config.embedding_multiplier or 1.0, model.dtype) / _rounded(family.embedding_scale, model.dtype)
    options["tie_word_embeddings"] = config.tie_word_embeddings and ratio == 1 and "lm_head" not in maps
    weights = _weights(model, family, maps, ratio)
    stock: Any = family.model(family.config(**options))
    stock.to(model.dtype)
    state = {}
    for stock_name, (name, tensor) in zip(stock.state_dict(), renamed(stock, family.names).items(), strict=True):
        weight = weights.get(name)
        if weight is None:
            assert name.endswith(("_norm.weight", ".bias")), name
            weight = torch.full_like(tensor, sqrt(EPSILON) if name.endswith("_norm.weight") else 0.0)
        weight = weight - family.gain_offset if name.endswith("_norm.weight") else weight
        state[stock_name] = weight.T if family.is_transposed and name.endswith("_proj.weight") else weight
    stock.load_state_dict(state)
    stock.generation_config = model.generation_config
    return stock.to(device=model.device).train(model.training)


@torch.no_grad()
def check_predictions(stock: PreTrainedModel, model: NormfreeForCausalLM, tokens: torch.Tensor) -> None:
    """Checks that ``stock``, an export of ``model``, predicts ``tokens``, int64 [n, T], as the model does.

    The stds of massive tokens may be too large to be lost in ε. Both models are left in evaluation mode.

    Raises:
        InputError: the tokens' log-probabilities differ by more than :data:`MOST_DIFFERENCE` nats in the mean.
    """
    differences = []
    for sequence in tokens.to(model.device).split(1):
        own, exported = (
            each.eval()(input_ids=sequence).logits[:, :-1].float().log_softmax(-1).gather(-1, sequence[:, 1:, None])
            for each in (model, stock)
        )
        differences.append((exported - own).abs().mean())
    difference = float(torch.stack(differences).mean())
    if not difference <= MOST_DIFFERENCE:
        raise InputError(
            f"log-probabilities of a stock export differ by {difference:.2g} nats from the model's, where its residual "
            "stream is too large for ε; use the model without norms"
        )


def _family(config: NormfreeConfig) -> _Family:
    if config.position == "learned":
        return _gpt2(config)
    if config.ffn != "gated":
        return _neox(config)
    if config.attn_logit_softcapping is not None:
        return _gemma(config, "Gemma 2", Gemma2ForCausalLM, Gemma2Config)
    if config.final_logit_softcapping is not None or len(parameter_sets(config)) > 1:
        return _gemma(config, "Gemma 3", Gemma3ForCausalLM, Gemma3TextConfig)
    return _llama(config) if config.sliding_window is None else _qwen3(config)


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
        required={**_layernorm(config), **_equal_heads(config)},
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
            "rope_parameters": {"partial_rotary_factor": 1.0, **(config.rope_parameters or {})},  # its default is 0.25
            "hidden_dropout": config.residual_dropout,
            "attention_dropout": config.attention_dropout,
        },
        required={
            "position": "rotary",
            **_layernorm(config),
            **_equal_heads(config),
            "embedding_dropout": config.residual_dropout,  # GPT-NeoX has one rate for both
        },
        carried=(*carried, "parallel_residual", "rope_parameters"),
        fuse=fuse,
    )


def _llama(config: NormfreeConfig) -> _Family:
    sets = parameter_sets(config)
    whole = {kind: {**each, "partial_rotary_factor": 1.0} for kind, each in sets.items()}
    rotates_parts = any(each.get("partial_rotary_factor", 1.0) != 1.0 for each in sets.values())
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
            "attention_dropout": config.attention_dropout,
        },
        required={
            "position": "rotary",
            "norm": config.norm if config.norm == "none" else FOLDED,
            "final_norm": config.final_norm if config.final_norm == "none" else FOLDED,
            "final_norm_is_centered": None if config.final_norm == "none" else False,
            "ffn": "gated",
            **({"rope_parameters": whole.get(None, whole)} if rotates_parts else {}),
        },
        carried=(*FOLDED_ALL, "attention_bias", "mlp_bias", "attention_dropout", "rope_parameters"),
        bias_options=("attention_bias", "mlp_bias"),
    )


def _qwen3(config: NormfreeConfig) -> _Family:
    llama_family = _llama(config)
    windows = {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": config.layer_types}
    return replace(
        llama_family,
        name="Qwen3",
        model=Qwen3ForCausalLM,
        config=Qwen3Config,
        options={**llama_family.options, **windows},
        carried=(*llama_family.carried, "sliding_window"),
        bias_options=("attention_bias",),
    )


def _gemma(config: NormfreeConfig, name: str, model: type[PreTrainedModel], config_class: type[Any]) -> _Family:
    llama_family, sets = _llama(config), parameter_sets(config)
    options = dict(llama_family.options)
    options |= {
        "hidden_activation": options.pop("hidden_act"),
        "query_pre_attn_scalar": config.head_dim,
        "sliding_window": config.sliding_window or config.n_positions,  # makes a mask even if no layer has a window
        "layer_types": config.layer_types,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    first, *others = sets.values()
    required, capped = dict(llama_family.required), ["final_logit_softcapping"]
    if config_class is Gemma3TextConfig:
        options["rope_parameters"] = {kind: deepcopy(sets.get(kind, first)) for kind in MASKS}
    else:
        required |= {"rope_parameters": first} if others else {}
        capped.append("attn_logit_softcapping")
    return replace(
        llama_family,
        name=name,
        model=model,
        config=config_class,
        names=gemma2.NAMES,
        options=options,
        required=required,
        carried=(*llama_family.carried, "sliding_window", *capped),
        bias_options=("attention_bias",),
        embedding_scale=config.n_embd**0.5,
        gain_offset=1.0,
    )


def _layernorm(config: NormfreeConfig) -> dict[str, Any]:
    """What a family with LayerNorm requires: it subtracts the mean of what every sublayer and the unembedding read."""
    places = ("pre", "sandwich")
    return {
        "norm_is_centered": True,
        "final_norm_is_centered": True,
        "norm_placement": config.norm_placement if config.norm_placement in places else "pre",
    }


def _activation(config: NormfreeConfig) -> str | None:
    """The stock name of the one activation of all layers; None if they differ or it has none."""
    first, *others = dict.fromkeys(config.activations)
    return None if others else STOCK_ACTIVATIONS.get(first)


def _equal_heads(config: NormfreeConfig) -> dict[str, int]:
    return {"n_kv_head": config.n_head, "head_dim": config.n_embd // config.n_head}


def _check_options(config: NormfreeConfig, family: _Family) -> None:
    if config.qk_norm != "none" and not config.qk_norm_is_constant:
        raise InputError(
            f"qk_norm = {config.qk_norm!r} has no counterpart in {family.name}: its norms share one ε, which undoes a "
            "norm that stays; remove it too (qk_norms: remove)"
        )
    default = NormfreeConfig.from_options({"n_layer": config.n_layer, "activation": config.activation})
    free = UNCHECKED | set(family.carried)
    wanted = {name: getattr(default, name) for name in NormfreeConfig.option_names() if name not in free}
    wanted |= {"norm": FOLDED, "final_norm": FOLDED, **family.required}
    for option, value in sorted(wanted.items(), key=lambda each: each[0] not in DECISIVE):
        if getattr(config, option) != value:
            raise InputError(
                f"{option} = {getattr(config, option)!r} has no counterpart in {family.name}; only {value!r} can be "
                "exported"
            )
    types = {each.get("rope_type") for each in parameter_sets(config).values()} & {*OUTGROWN}
    if types:
        raise InputError(
            f"rope_parameters of rope_type {types.pop()!r} have no counterpart in {family.name}, which keeps cached "
            "keys when a sequence outgrows the original length; other types can be exported"
        )
    if _activation(config) is None:
        raise InputError(
            f"activation {config.activation!r} has no counterpart in {family.name}; allowed, for all layers: "
            f"{', '.join(STOCK_ACTIVATIONS)}"
        )


def _bias_options(folded: NormfreeConfig, family: _Family) -> dict[str, bool]:
    """The family's options for the biases of the ``folded`` model.

    Raises:
        InputError: the family has no such biases.
    """
    if folded.lm_head_bias:
        raise InputError(f"lm_head_bias, which takes in the shift of norms, has no counterpart in {family.name}")
    if family.bias_options is None:
        return {}
    has = {"attention_bias": folded.attention_bias != "none", "mlp_bias": folded.mlp_bias}
    for option in has.keys() - set(family.bias_options):
        if has[option]:
            raise InputError(f"{option} = True has no counterpart in {family.name}; only False can be exported")
    return {option: has[option] for option in family.bias_options}


def _weights(model: NormfreeForCausalLM, family: _Family, maps: dict[str, Affine], embedding_ratio: float) -> Weights:
    """The weights under Normfree's names, float64, without those of norms that have no effect.

    Queries take in the scale of the scores, and the embeddings theirs.
    """
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items() if "_norm." not in name}
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * embedding_ratio
    query_scale = 1.0 if config.attention_scale is None else config.attention_scale * sqrt(config.head_dim)
    for name, (weight, bias) in maps.items():
        scale = query_scale if name.endswith(".q_proj") else 1.0
        weights[f"{name}.weight"] = scale * weight
        if bias is not None:
            weights[f"{name}.bias"] = scale * bias
    for layer in range(config.n_layer):
        if family.fuse is None:
            break
        attention = f"model.blocks.{layer}.attention"
        rows = [weights[f"{attention}.{each}_proj.weight"] for each in "qkv"]
        biases = [weights.get(f"{attention}.{each}_proj.bias", rows[0].new_zeros(len(rows[0]))) for each in "qkv"]
        weights[f"{attention}.qkv_proj.weight"] = family.fuse(rows)
        weights[f"{attention}.qkv_proj.bias"] = family.fuse(biases)
    final = model.model.final_norm
    if isinstance(final, ConstantStdNorm) and "lm_head" not in maps:
        weights["model.final_norm.weight"] = final.weight.double() * (sqrt(EPSILON) / final.std[0].double())
        if final.bias is not None:
            weights["model.final_norm.bias"] = final.bias.double()
    return weights


def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=dtype))
