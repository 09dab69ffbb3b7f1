"""Options of transformers' configurations and their counterparts in Normfree's."""

from __future__ import annotations

from typing import Any

from normfree.errors import InputError, unknown_name
from normfree.modeling.layer_types import SLIDING

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


def shared_options(model: Any) -> dict[str, Any]:
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


def activation_name(option: str, name: str) -> str:
    """Normfree's name of the activation that transformers calls ``name``; ``option`` is where it is written.

    Raises:
        InputError: Normfree has no such activation.
    """
    if name not in HF_ACTIVATIONS:
        raise unknown_name(option, name, HF_ACTIVATIONS)
    return HF_ACTIVATIONS[name]


def window_options(hf: Any) -> dict[str, Any]:
    """The kind of attention of each layer, and the window if a layer has one."""
    kinds = list(hf.layer_types)
    return {"layer_types": kinds, "sliding_window": hf.sliding_window if SLIDING in kinds else None}


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
