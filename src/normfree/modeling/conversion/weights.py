"""Weights of a model under Normfree's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from normfree.errors import InputError


def renamed(model: PreTrainedModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The model's state dict; each key of ``names`` in a parameter's name is replaced by its value, in order."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    return weights


def split_fused(
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
