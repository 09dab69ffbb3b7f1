"""Checks that a model to be converted has its class's own modules and weights, as plain tensors in memory.

The model is compared with its class built on the meta device. This finds adapters, quantized layers, wrapped or
replaced modules and weights of another shape.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from normfree.errors import InputError

HINTS = {
    "OptimizedModule": "it is compiled: give what was compiled, model._orig_mod",
    "DistributedDataParallel": "it is wrapped: give model.module",
    "DataParallel": "it is wrapped: give model.module",
    "FullyShardedDataParallel": "it is sharded: load the model again, whole",
    "PeftModel": "it has adapters: merge them with model.merge_and_unload() and give the result",
}
"""Class names of wrapped models, and what to give instead."""


def wrapper_hint(model: object) -> str | None:
    """What to give instead of a wrapped model; None for others."""
    names = {kind.__name__ for kind in type(model).__mro__}
    if any(name.startswith("FSDP") for name in names):
        return HINTS["FullyShardedDataParallel"]
    return next((hint for name, hint in HINTS.items() if name in names), None)


def check_own_modules(model: PreTrainedModel) -> None:
    """Checks that ``model`` has the modules and the weights that its class makes for its configuration.

    Raises:
        InputError: it is quantized, has adapters or other modules, or weights that are in several dtypes, on several
            devices, offloaded, no plain tensors, or of other shapes.
    """
    name = type(model).__name__
    _check_not_quantized(model)
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(dtypes) > 1 or len(devices) > 1 or "meta" in devices:
        raise InputError(
            f"from_hf needs all weights of the {name} in memory, of one dtype on one device; "
            f"it has {', '.join(sorted(dtypes))} on {', '.join(sorted(devices))}"
        )
    with torch.device("meta"), no_init_weights():
        own = type(model)(deepcopy(model.config))
    _check_modules(model, own)
    _check_weights(model, own)


def _check_not_quantized(model: PreTrainedModel) -> None:
    """Refuses quantized weights: by the configuration, by the quantizer, or because they are no plain tensors."""
    name = type(model).__name__
    way = getattr(model.config, "quantization_config", None)
    if way is not None or getattr(model, "hf_quantizer", None) is not None:
        method = way.get("quant_method") if isinstance(way, dict) else getattr(way, "quant_method", None)
        shown = f" ({getattr(method, 'value', method)})" if method is not None else ""
        raise InputError(
            f"from_hf cannot convert a quantized {name}{shown}; load it without quantization, or dequantize it first"
        )
    for key, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
            raise InputError(
                f"from_hf needs plain tensors, and {key} of the {name} is of type {kind} (quantized or sharded); "
                "load the model without quantization, whole"
            )


def _check_modules(model: PreTrainedModel, own: nn.Module) -> None:
    expected = {key: type(module) for key, module in own.named_modules()}
    found = {key: type(module) for key, module in model.named_modules()}
    for key in [*expected, *found]:
        if found.get(key) is not expected.get(key):
            raise InputError(
                f"from_hf: the class of this {type(model).__name__} has {_kind(expected.get(key))} at {key}, and the "
                f"model {_kind(found.get(key))}; merge adapters, undo quantization or wrappers first"
            )


def _kind(kind: type[nn.Module] | None) -> str:
    if kind is None:
        return "no module"
    return kind.__name__ if kind.__module__.startswith("transformers.") else f"{kind.__module__}.{kind.__name__}"


def _check_weights(model: PreTrainedModel, own: nn.Module) -> None:
    def shapes(each: nn.Module) -> dict[str, Any]:
        return {key: getattr(value, "shape", None) for key, value in each.state_dict().items()}

    expected, found = shapes(own), shapes(model)
    different = sorted(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
    if different:
        raise InputError(
            f"from_hf: weights of the {type(model).__name__} are not those that its class makes for its configuration: "
            f"{', '.join(different[:5])}{f' and {len(different) - 5} more' if len(different) > 5 else ''}"
        )
