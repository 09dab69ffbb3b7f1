"""Conversion of a trained dense model to a sparse one of the same sizes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from normfree.errors import InputError

Model = TypeVar("Model", bound=PreTrainedModel)


def to_spark(
    model: Model,
    *,
    ffn: bool = True,
    attention: bool = True,
    ffn_active: int | float | None = None,
    ffn_predictor_dim: int | float | None = None,
    attention_active: int | float | None = None,
    attention_predictor_dim: int | float | None = None,
    topk: str | None = None,
) -> Model:
    """A sparse model with the weights of a dense one. It computes another function: train it.

    - Kept: embeddings, norms, unembedding, all projections of attention, and of the feed-forward network the last
      projection and every bias.
    - A dense network's first weight W_in [n_inner, n_embd] is cut in two: its first r columns, with its bias, become
      the predictor, the others the weights of the chosen neurons. The sum of two products becomes their product, so
      the number of parameters stays and the function of the layer does not.
    - A gated network keeps the first r columns of its gate, as the predictor, and the other columns of W_in: 2/3 of its
      parameters. Each factor of a neuron then reads a part of the input.
    - Sparse attention scores keys by the first dimensions of each head; the others weigh the values.

    Args:
        model: a :class:`~normfree.NormfreeForCausalLM`; it is not changed.
        ffn, attention: which of the two become sparse.
        ffn_active, ffn_predictor_dim, attention_active, attention_predictor_dim, topk: options of
            :class:`~normfree.NormfreeConfig`, with its defaults.

    Returns:
        A model of the same dtype, on the same device, in the same mode.

    Raises:
        InputError: neither part is asked for, one is sparse already, or an option does not fit.
    """
    parts = [name for name, is_asked in (("ffn", ffn), ("attention", attention)) if is_asked]
    sizes = {
        "ffn_active": ffn_active,
        "ffn_predictor_dim": ffn_predictor_dim,
        "attention_active": attention_active,
        "attention_predictor_dim": attention_predictor_dim,
        "topk": topk,
    }
    config = _spark_config(model.config, parts, {name: value for name, value in sizes.items() if value is not None})
    implementation = None if config.attention == "spark" else model.config._attn_implementation
    with torch.device(model.device), no_init_weights():
        converted: Model = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=implementation
        )
    converted.tie_weights()
    weights = dict(model.state_dict())
    if ffn:
        for layer in range(config.n_layer):
            _cut(weights, f"model.blocks.{layer}.ffn", config.spark_sizes.ffn_predictor_dim)
    converted.load_state_dict(weights)
    converted.generation_config = deepcopy(model.generation_config)
    converted.train(model.training)
    return converted


def _spark_config(config: Any, parts: list[str], sizes: dict[str, Any]) -> Any:
    """``config`` with ``parts`` (ffn, attention) spark and options ``sizes``."""
    if not parts:
        raise InputError("to_spark has nothing to do: ask for ffn, attention or both")
    for name in parts:
        if getattr(config, name) == "spark":
            raise InputError(f"the model's {name} is spark already; give a dense model, or leave {name} out")
    options = {name: getattr(config, name) for name in config.option_names()}
    return type(config)(**{**options, **dict.fromkeys(parts, "spark"), **sizes})


def _cut(weights: dict[str, torch.Tensor], ffn: str, r: int) -> None:
    """Replaces the weights of one dense or gated network by those of a sparse one."""
    up, gate = f"{ffn}.up_proj", f"{ffn}.gate_proj"
    chooser = gate if f"{gate}.weight" in weights else up
    whole = weights[f"{up}.weight"]
    weights[f"{ffn}.predictor_proj.weight"] = weights[f"{chooser}.weight"][:, :r]
    weights[f"{up}.weight"] = whole[:, r:]
    if f"{chooser}.bias" in weights:
        weights[f"{ffn}.predictor_proj.bias"] = weights[f"{chooser}.bias"]
    for name in (f"{gate}.weight", f"{gate}.bias", f"{up}.bias"):
        weights.pop(name, None)
