"""Hugging Face's GPT-2, GPT-NeoX, Llama and Qwen3 models as configurations of our decoder, with the same logits.

A new architecture is one function from the model to its configuration and its weights, under our names, and
one line in ``CONVERTERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers.initialization import no_init_weights

from normfree.errors import InputError, unknown_name
from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.decoder import NormfreeForCausalLM

Converted = tuple[NormfreeConfig, dict[str, torch.Tensor]]

HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # writes sqrt(2/pi) with ten digits: the same float32
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",  # both sides' default slope is 0.01
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
"""Hugging Face's activation names and ours for the same function."""


def from_hf(model: PreTrainedModel) -> NormfreeForCausalLM:
    """A Hugging Face causal language model as one of ours, with the same logits.

    Args:
        model: a ``GPT2LMHeadModel``, ``GPTNeoXForCausalLM``, ``LlamaForCausalLM`` or ``Qwen3ForCausalLM``; it is left
            as it is.

    Returns:
        A model with copies of the weights, of the same dtype, on the same device, in the same (training or
        evaluation) mode, with the same dropout rates, attention implementation, token ids and generation
        configuration.

    Raises:
        InputError: another class, an option our decoder has no counterpart for, or weights that are not the
            architecture's own (adapters, quantized or offloaded weights, several dtypes).
    """
    name = type(model).__name__
    if type(model) not in CONVERTERS:
        allowed = ", ".join(each.__name__ for each in CONVERTERS)
        raise InputError(f"from_hf cannot convert a {name}; allowed: {allowed}")
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(dtypes) > 1 or len(devices) > 1 or "meta" in devices:
        raise InputError(
            f"from_hf needs all weights of the {name} in memory, of one dtype on one device; "
            f"it has {', '.join(sorted(dtypes))} on {', '.join(sorted(devices))}"
        )
    config, weights = CONVERTERS[type(model)](model)
    with torch.device(model.device), no_init_weights():
        converted: NormfreeForCausalLM = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    converted.tie_weights()
    without_counterpart = sorted(converted.state_dict().keys() ^ weights.keys())
    if without_counterpart:
        raise InputError(f"from_hf: weights of the {name} without a counterpart: {', '.join(without_counterpart)}")
    converted.load_state_dict(weights)
    _copy_rotary_state(model, converted)
    converted.generation_config = deepcopy(model.generation_config)
    converted.train(model.training)
    return converted


def _copy_rotary_state(model: PreTrainedModel, converted: NormfreeForCausalLM) -> None:
    """Frequencies are not in the state dict, yet ``model.to(dtype)`` rounds, dynamic scaling moves them."""
    rotary = converted.model.rotary_embedding
    if rotary is None:
        return
    source: Any = model.base_model.rotary_emb
    rotary.inv_freq = source.inv_freq.clone()
    rotary.original_inv_freq = source.original_inv_freq.clone()
    rotary.max_seq_len_cached = source.max_seq_len_cached
    rotary.attention_scaling = source.attention_scaling


def _convert_gpt2(model: Any) -> Converted:
    """GPT-2 (Radford et al. 2019): its projections hold W with shape [in, out] and one fused W_qkv."""
    hf = model.config
    _require(
        hf,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
    )
    config = NormfreeConfig(
        **_shared_options(model),
        n_inner=hf.n_inner,
        norm_eps=hf.layer_norm_epsilon,
        activation=_activation("activation_function", hf.activation_function),
        scale_residual_init=True,
        embedding_dropout=hf.embd_pdrop,
        attention_dropout=hf.attn_pdrop,
        residual_dropout=hf.resid_pdrop,
    )
    names = {
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
    weights = {
        name: tensor.T if name.endswith("_proj.weight") else tensor for name, tensor in _renamed(model, names).items()
    }
    return config, _split_fused(weights, lambda fused: list(fused.chunk(3)))


def _convert_gpt_neox(model: Any) -> Converted:
    """GPT-NeoX and Pythia (Black et al. 2022): W_qkv holds the query, key and value rows head by head."""
    hf = model.config
    config = NormfreeConfig(
        **_shared_options(model),
        n_inner=hf.intermediate_size,
        norm_eps=hf.layer_norm_eps,
        parallel_residual=hf.use_parallel_residual,
        activation=_activation("hidden_act", hf.hidden_act),
        attention_bias=hf.attention_bias,
        position="rotary",
        rope_parameters=deepcopy(hf.rope_parameters),
        embedding_dropout=hf.hidden_dropout,
        attention_dropout=hf.attention_dropout,
        residual_dropout=hf.hidden_dropout,
    )
    names = {
        "gpt_neox.embed_in.": "model.embed_tokens.",
        "gpt_neox.layers.": "model.blocks.",
        "gpt_neox.final_layer_norm.": "model.final_norm.",
        ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
        ".attention.query_key_value.": ".attention.qkv_proj.",
        ".attention.dense.": ".attention.o_proj.",
        ".mlp.dense_h_to_4h.": ".ffn.up_proj.",
        ".mlp.dense_4h_to_h.": ".ffn.down_proj.",
    }

    def split(fused: torch.Tensor) -> list[torch.Tensor]:
        by_head = fused.reshape(hf.num_attention_heads, 3, -1, *fused.shape[1:])
        return [part.flatten(0, 1) for part in by_head.unbind(1)]

    return config, _split_fused(_renamed(model, names), split)


def _convert_llama(model: Any) -> Converted:
    """Llama (Touvron et al. 2023; grouped queries and scaled rotary frequencies from later versions)."""
    return _converted_llama(model, mlp_bias=model.config.mlp_bias)


def _convert_qwen3(model: Any) -> Converted:
    """Qwen3 (Yang et al. 2025): Llama's architecture with an RMSNorm over each head's queries and keys."""
    _require(model.config, layer_types=["full_attention"] * model.config.num_hidden_layers)
    return _converted_llama(model, mlp_bias=False, qk_norm="rmsnorm")


def _converted_llama(model: Any, **options: Any) -> Converted:
    """Llama's architecture, and ``options`` of ours that it leaves open."""
    hf = model.config
    rotated = hf.rope_parameters.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise InputError(
            f"from_hf: rope_parameters has partial_rotary_factor = {rotated}, which {type(model).__name__} does not "
            "follow: it rotates whole heads; only 1.0 can be converted"
        )
    config = NormfreeConfig(
        **_shared_options(model),
        **options,
        n_kv_head=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        n_inner=hf.intermediate_size,
        norm="rmsnorm",
        final_norm="rmsnorm",
        norm_eps=hf.rms_norm_eps,
        ffn="gated",
        activation=_activation("hidden_act", hf.hidden_act),
        attention_bias=hf.attention_bias,
        position="rotary",
        rope_parameters=deepcopy(hf.rope_parameters),
        attention_dropout=hf.attention_dropout or 0.0,
    )
    names = {
        "model.layers.": "model.blocks.",
        "model.norm.": "model.final_norm.",
        ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
        ".self_attn.": ".attention.",
        ".mlp.": ".ffn.",
    }
    return config, _renamed(model, names)


CONVERTERS: dict[type[PreTrainedModel], Callable[[Any], Converted]] = {
    GPT2LMHeadModel: _convert_gpt2,
    GPTNeoXForCausalLM: _convert_gpt_neox,
    LlamaForCausalLM: _convert_llama,
    Qwen3ForCausalLM: _convert_qwen3,
}


def _shared_options(model: Any) -> dict[str, Any]:
    """The options that every architecture has; embeddings count as tied where the two are one parameter."""
    hf = model.config
    return {
        "vocab_size": hf.vocab_size,
        "n_positions": hf.max_position_embeddings,
        "n_layer": hf.num_hidden_layers,
        "n_head": hf.num_attention_heads,
        "n_embd": hf.hidden_size,
        "initializer_range": hf.initializer_range,
        "tie_word_embeddings": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "use_cache": hf.use_cache,
        "bos_token_id": hf.bos_token_id,
        "eos_token_id": hf.eos_token_id,
        "pad_token_id": hf.pad_token_id,
    }


def _activation(option: str, name: str) -> str:
    if name not in HF_ACTIVATIONS:
        raise unknown_name(option, name, HF_ACTIVATIONS)
    return HF_ACTIVATIONS[name]


def _require(hf: Any, **convertible: object) -> None:
    for option, value in convertible.items():
        if getattr(hf, option) != value:
            raise InputError(
                f"from_hf: {option} = {getattr(hf, option)} has no counterpart; only {value} can be converted"
            )


def _renamed(model: PreTrainedModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The model's weights, with the parts ``names`` of their names replaced."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    return weights


def _split_fused(
    weights: dict[str, torch.Tensor], split: Callable[[torch.Tensor], list[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """``weights`` with each fused qkv projection (its output along dimension 0) split into q, k and v."""
    separate = {}
    for name, tensor in weights.items():
        if ".qkv_proj." in name:
            for projection, part in zip("qkv", split(tensor), strict=True):
                separate[name.replace(".qkv_proj.", f".{projection}_proj.")] = part
        else:
            separate[name] = tensor
    return separate
