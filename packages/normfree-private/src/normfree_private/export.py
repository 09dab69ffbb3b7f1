"""A model as the engine takes it: a JSON configuration, its secret weights by name, and its public tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.activations import LearnableLeakyReLU
from normfree.modeling.attention import SoftmaxAttention
from normfree.modeling.blocks import Block
from normfree.modeling.constant_std import ConstantStdNorm
from normfree.modeling.norms import DynamicTanh
from normfree_private.operations import NORM_KINDS, check_supported

Arrays = dict[str, npt.NDArray[np.float32]]


def engine_config(config: NormfreeConfig) -> dict[str, Any]:
    """What ``engine/decoder.py`` reads of a configuration, as JSON.

    Raises:
        InputError: the model has no encrypted counterpart.
    """
    check_supported(config)
    names = ("n_layer", "n_head", "n_kv_head", "head_dim", "norm_placement", "parallel_residual", "norm_eps")
    return {
        **{name: getattr(config, name) for name in (*names, "norm_is_centered", "ffn", "negative_slope")},
        "norm": NORM_KINDS[config.norm],
        "final_norm": NORM_KINDS[config.final_norm],
        "activations": config.activations,
    }


def block_weights(model: NormfreeForCausalLM, layer: int) -> Arrays:
    """The secret arrays of block ``layer``; linear maps are [n_in, n_out]."""
    return {name: _array(tensor) for name, tensor in _block_tensors(model.model.blocks[layer], model.config)}


def model_weights(model: NormfreeForCausalLM, sequence_length: int) -> Arrays:
    """The secret arrays of the whole model, for sequences of ``sequence_length`` tokens.

    Raises:
        InputError: the model has fewer than ``sequence_length`` positions.
    """
    if model.config.n_positions < sequence_length:
        raise InputError(
            f"the model has {model.config.n_positions} positions, fewer than the {sequence_length} tokens of "
            "--sequence-length"
        )
    arrays = {"embedding": _array(model.model.embed_tokens.weight)}
    if model.model.embed_positions is not None:
        arrays["positions"] = _array(model.model.embed_positions.weight[:sequence_length])
    for layer in range(model.config.n_layer):
        arrays |= {f"blocks.{layer}.{name}": each for name, each in block_weights(model, layer).items()}
    arrays |= {name: _array(each) for name, each in _norm_tensors(model.model.final_norm, "final")}
    arrays["unembedding"] = _array(model.lm_head.weight.T)
    if model.lm_head.bias is not None:
        arrays["unembedding_bias"] = _array(model.lm_head.bias)
    return arrays


def public_tables(model: NormfreeForCausalLM, sequence_length: int) -> Arrays:
    """cos and sin of rotary positions, [T, rotated] each; nothing for learned positions."""
    if model.model.rotary_embedding is None:
        return {}
    positions = torch.arange(sequence_length, device=model.device).unsqueeze(0)
    cos, sin = model.model.rotary_embedding(torch.zeros(1, device=model.device), positions)
    return {"cos": _array(cos[0]), "sin": _array(sin[0])}


def one_hot(tokens: torch.Tensor, vocab_size: int) -> npt.NDArray[np.float32]:
    """Tokens [T] as rows [T, vocab_size] of zeros and one one: what their owner shares."""
    return _array(nn.functional.one_hot(tokens, vocab_size))


def _block_tensors(block: nn.Module, config: NormfreeConfig) -> Iterator[tuple[str, torch.Tensor]]:
    assert isinstance(block, Block)
    attention, ffn = block.attention, block.ffn
    assert isinstance(attention, SoftmaxAttention)
    names = {name: attention.get_submodule(f"{name}_proj") for name in "qkvo"}
    names |= {
        name: ffn.get_submodule(f"{name}_proj") for name in ("up", "down", "gate") if hasattr(ffn, f"{name}_proj")
    }
    for name, projection in names.items():
        assert isinstance(projection, nn.Linear)
        # The scale of the scores costs nothing in the weights of the queries.
        scale = attention.scaling if name == "q" else 1.0
        yield f"{name}_weight", projection.weight.T * scale
        if projection.bias is not None:
            yield f"{name}_bias", projection.bias * scale
    yield from _norm_tensors(block.attention_norm, "attention_norm")
    if config.norm == "constant_std":
        yield from _norm_tensors(block.attention_norm, "value_norm", reader=1)
    yield from _norm_tensors(block.ffn_norm, "ffn_norm")
    if isinstance(ffn.activation, LearnableLeakyReLU):
        yield "negative_slope", ffn.activation.negative_slope


def _norm_tensors(norm: nn.Module, name: str, reader: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Gain, bias and α of a norm; a constant std of reader ``reader`` is divided into its gain."""
    if isinstance(norm, nn.Identity):
        return
    scale = getattr(norm, "scale", 1.0)
    std = norm.std[reader] if isinstance(norm, ConstantStdNorm) else 1.0
    yield f"{name}_gain", norm.get_parameter("weight") * scale / std
    if getattr(norm, "bias", None) is not None:
        yield f"{name}_bias", norm.get_parameter("bias") * scale
    if isinstance(norm, DynamicTanh):
        yield f"{name}_alpha", norm.alpha


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
