"""``from_hf``: conversion of transformers' causal language models, with the same logits."""

from __future__ import annotations

import importlib
import pkgutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from normfree.errors import InputError
from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.conversion.checks import check_own_modules, wrapper_hint
from normfree.modeling.conversion.family import FAMILIES, Family
from normfree.modeling.decoder import NormfreeForCausalLM
from normfree.modeling.rotary import RotaryByLayerType


def from_hf(model: PreTrainedModel) -> NormfreeForCausalLM:
    """The Normfree model with the logits of a causal language model of transformers.

    Args:
        model: of a class that a family of :mod:`normfree.modeling.conversion` declares; it is not changed.

    Returns:
        A model with copies of the weights, of the same dtype, on the same device, in the same (training or
        evaluation) mode, with the same dropout rates, attention implementation, token ids and generation
        configuration.

    Raises:
        InputError: another class or a wrapped model, an option the decoder has no counterpart for, or modules and
            weights that are not the architecture's own (adapters, quantized, sharded or offloaded weights, several
            dtypes).
    """
    name = type(model).__name__
    family = _family_of(model)
    check_own_modules(model)
    options, weights = family.convert(model)
    with torch.device(model.device), no_init_weights():
        converted: NormfreeForCausalLM = AutoModelForCausalLM.from_config(
            NormfreeConfig(**options), dtype=model.dtype, attn_implementation=model.config._attn_implementation
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


def families() -> dict[str, Family]:
    """The families that can be converted, by class name, in alphabetical order.

    They are found by listing the modules of this package, so a new family is one new file.
    """
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        importlib.import_module(module.name)
    return dict(sorted(FAMILIES.items()))


def _family_of(model: PreTrainedModel) -> Family:
    kind = type(model)
    family = families().get(kind.__name__)
    if family is None or kind.__module__ != family.module:
        name = kind.__name__ if family is None else f"{kind.__name__} of {kind.__module__}"
        advice = wrapper_hint(model) or f"allowed: {', '.join(families())}"
        raise InputError(f"from_hf cannot convert a {name}; {advice}")
    return family


def _copy_rotary_state(model: PreTrainedModel, converted: NormfreeForCausalLM) -> None:
    """Copies rotary frequencies, which are in no state dict but change by ``model.to(dtype)`` and dynamic scaling.

    In Gemma 3 the names of a kind of layer begin with the kind. GPT-J has a table of sines and cosines instead, which
    its converter checks.
    """
    rotary = converted.model.rotary_embedding
    source: Any = getattr(model.base_model, "rotary_emb", None)
    kinds = dict(rotary.items()) if isinstance(rotary, RotaryByLayerType) else {converted.config.layer_types[0]: rotary}
    for kind, each in kinds.items():
        prefix = next((name for name in ("", f"{kind}_") if hasattr(source, f"{name}inv_freq")), None)
        if each is None or prefix is None:
            continue
        for name in ("inv_freq", "original_inv_freq"):
            setattr(each, name, getattr(source, f"{prefix}{name}").clone())
        each.max_seq_len_cached = getattr(source, f"{prefix}max_seq_len_cached", source.max_seq_len_cached)
        each.attention_scaling = getattr(source, f"{prefix}attention_scaling")
