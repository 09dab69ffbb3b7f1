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
    weights: dict[str, torch.Tensor],
    split: Callable[[torch.Tensor], list[torch.Tensor]],
    fused: str = "qkv_proj",
    parts: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
) -> dict[str, torch.Tensor]:
    """``weights`` with each projection ``fused`` (its output along dimension 0) split into ``parts``."""
    separate = {}
    for name, tensor in weights.items():
        if f".{fused}." in name:
            for projection, part in zip(parts, split(tensor), strict=True):
                separate[name.replace(f".{fused}.", f".{projection}.")] = part
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
