"""A trained dense model as the start of a sparse one of the same sizes."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

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
    """A model with sparse layers that starts from the weights of a dense one. It computes another function: train it.

    - Kept as they are: embeddings, norms, unembedding, all projections of attention, and of the feed-forward network
      the last projection and every bias.
    - A dense network's first weight W_in [n_inner, n_embd] is cut in two: its first r columns, with its bias, become
      the predictor, the others what the chosen neurons compute. Nothing is lost or added, but a neuron was the sum of
      the two products and is now the product of them: the number of parameters stays, the function of the layer does
      not.
    - A gated network keeps the first r columns of its gate, as the predictor, and the other columns of W_in; the rest
      of both is dropped, since what they did is gone: it has 2/3 of its parameters left. Its gate had the same place
      as the predictor, so a neuron is what it was, each factor seeing a part of the input.
    - Sparse attention has the projections of softmax attention. Its scores are those of the first dimensions of each
      head alone, and the other dimensions weigh the values.

    Args:
        model: one of ours; it is left as it is.
        ffn, attention: which of the two become sparse.
        ffn_active, ffn_predictor_dim, attention_active, attention_predictor_dim, topk: options of
            :class:`~normfree.NormfreeConfig`, with its defaults.

    Returns:
        A model of the same dtype, on the same device, in the same mode.

    Raises:
        InputError: neither part is asked for, one is sparse already, the model's norms are inside what is cut, or an
            option does not fit.
    """
    config = model.config
    wanted = {name: asked for name, asked in (("ffn", ffn), ("attention", attention)) if asked}
    if not wanted:
        raise InputError("to_spark has nothing to do: ask for ffn, attention or both")
    for name in wanted:
        if getattr(config, name) == "spark":
            raise InputError(f"the model's {name} is spark already; give a dense model, or leave {name} out")
    sizes = {
        "ffn_active": ffn_active,
        "ffn_predictor_dim": ffn_predictor_dim,
        "attention_active": attention_active,
        "attention_predictor_dim": attention_predictor_dim,
        "topk": topk,
    }
    options = {name: getattr(config, name) for name in config.option_names()}
    options |= dict.fromkeys(wanted, "spark")
    options |= {name: value for name, value in sizes.items() if value is not None}
    spark_config = type(config)(**options)
    implementation = None if spark_config.attention == "spark" else config._attn_implementation
    with torch.device(model.device), no_init_weights():
        converted: Model = AutoModelForCausalLM.from_config(
            spark_config, dtype=model.dtype, attn_implementation=implementation
        )
    converted.tie_weights()
    weights = dict(model.state_dict())
    if ffn:
        for layer in range(config.n_layer):
            _cut(weights, f"model.blocks.{layer}.ffn", spark_config.spark_sizes.ffn_predictor_dim)
    converted.load_state_dict(weights)
    converted.generation_config = deepcopy(model.generation_config)
    converted.train(model.training)
    return converted


def _cut(weights: dict[str, torch.Tensor], ffn: str, r: int) -> None:
    """Puts the weights of one dense or gated network in the places of a sparse one."""
    up, gate = f"{ffn}.up_proj", f"{ffn}.gate_proj"
    chooser = gate if f"{gate}.weight" in weights else up
    whole = weights[f"{up}.weight"]
    weights[f"{ffn}.predictor_proj.weight"] = weights[f"{chooser}.weight"][:, :r]
    weights[f"{up}.weight"] = whole[:, r:]
    if f"{chooser}.bias" in weights:
        weights[f"{ffn}.predictor_proj.bias"] = weights[f"{chooser}.bias"]
    for name in (f"{gate}.weight", f"{gate}.bias", f"{up}.bias"):
        weights.pop(name, None)
