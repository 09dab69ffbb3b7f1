"""How a family declares itself: one module of this package, with one function marked ``@converts``.

The function maps a model to the options of its :class:`~normfree.NormfreeConfig` and its weights under Normfree's
names. Families import no modeling module of transformers: a model is matched by the name and the module of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from normfree.errors import InputError, unknown_name
from normfree.modeling.layer_types import SLIDING

Options = dict[str, Any]
Weights = dict[str, torch.Tensor]
Converter = Callable[[Any], tuple[Options, Weights]]
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
"""transformers' activation names and Normfree's for the same function."""


@dataclass(frozen=True)
class Family:
    """A class of transformers and its converter.

    class_name: of the causal language model.
    module: where transformers defines it.
    """

    class_name: str
    module: str
    convert: Converter


FAMILIES: dict[str, Family] = {}
"""The families whose modules have been imported, by class name."""


def converts(model_type: str, class_name: str) -> Callable[[Converter], Converter]:
    """Declares the decorated function as the converter of ``class_name`` in transformers' folder ``model_type``."""

    def declare(convert: Converter) -> Converter:
        module = f"transformers.models.{model_type}.modeling_{model_type}"
        FAMILIES[class_name] = Family(class_name, module, convert)
        return convert

    return declare


def require(hf: Any, **convertible: object) -> None:
    """Checks that options of the configuration ``hf`` have the only values that can be converted.

    Raises:
        InputError: one has another value.
    """
    for option, value in convertible.items():
        if getattr(hf, option) != value:
            raise InputError(
                f"from_hf: {option} = {getattr(hf, option)} has no counterpart; only {value} can be converted"
            )


def shared_options(model: Any) -> Options:
    """The options that every architecture has; embeddings count as tied where the two are one parameter."""
    hf = model.config
    return {
        "vocab_size": hf.vocab_size,
        "n_positions": hf.max_position_embeddings,
        "n_layer": hf.num_hidden_layers,
        "n_head": hf.num_attention_heads,
        "n_embd": hf.hidden_size,
        "initializer_range": getattr(hf, "initializer_range", 0.02),  # OPT has another name for it
        "tie_word_embeddings": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "use_cache": hf.use_cache,
        "bos_token_id": hf.bos_token_id,
        "eos_token_id": hf.eos_token_id,
        "pad_token_id": hf.pad_token_id,
    }


def activation_name(hf: Any, option: str) -> str:
    """Normfree's name of the activation that ``option`` of the configuration ``hf`` names.

    Raises:
        InputError: Normfree has no such activation.
    """
    name = getattr(hf, option)
    if name not in HF_ACTIVATIONS:
        raise unknown_name(option, name, HF_ACTIVATIONS)
    return HF_ACTIVATIONS[name]


def window_options(hf: Any) -> Options:
    """The kind of attention of each layer, and the window if a layer has one."""
    kinds = list(hf.layer_types)
    return {"layer_types": kinds, "sliding_window": hf.sliding_window if SLIDING in kinds else None}


def renamed(model: Any, names: dict[str, str]) -> Weights:
    """The model's state dict; each key of ``names`` in a parameter's name is replaced by its value, in order."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for in_transformers, in_normfree in names.items():
            name = name.replace(in_transformers, in_normfree)
        weights[name] = tensor
    return weights


def split_fused(
    weights: Weights,
    split: Callable[[torch.Tensor], list[torch.Tensor]],
    fused: str = "qkv_proj",
    parts: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
) -> Weights:
    """``weights`` with each projection ``fused`` (its output along dimension 0) split into ``parts``."""
    separate = {}
    for name, tensor in weights.items():
        if f".{fused}." in name:
            for projection, part in zip(parts, split(tensor), strict=True):
                separate[name.replace(f".{fused}.", f".{projection}.")] = part
        else:
            separate[name] = tensor
    return separate


def with_own_ffn_norm(weights: Weights) -> Weights:
    """``weights`` of a model whose attention and feed-forward network read one norm, with a copy for each."""
    copies = {name.replace(".attention_norm.", ".ffn_norm."): tensor for name, tensor in weights.items()}
    return copies | weights


def computed(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value``, float64, of the weight ``name`` that a conversion computes from others, in ``dtype``.

    Raises:
        InputError: half precision would round it, and the conversion change the model.
    """
    rounded = value.to(dtype)
    if dtype.itemsize < torch.float32.itemsize and not torch.equal(rounded.double(), value):
        raise InputError(
            f"from_hf computes {name} from other weights, and {str(dtype).removeprefix('torch.')} cannot hold the "
            "result; convert the model in float32: from_hf(model.float())"
        )
    return rounded
