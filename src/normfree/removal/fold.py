"""Folding: norms with a constant std are linear, so the weights that read them absorb them.

A reader W x' + b of x' = C x / σ ⊙ gain + bias, where C = I - 11ᵀ/n_embd subtracts the mean (C = I for a former
RMSNorm), is a linear map of x with

    W' = W diag(gain) C / σ,    b' = b + W bias.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.attention import BIASED_PROJECTIONS
from normfree.modeling.blocks import Block
from normfree.modeling.constant_std import ConstantStdNorm
from normfree.modeling.norms import POINTWISE_NORMS, SCALED_NORMS

FOLDED = "constant_std"


def remove_norms(model: NormfreeForCausalLM) -> NormfreeForCausalLM:
    """The same function without norms: every ``constant_std`` norm is folded into the weights that read it.

    Args:
        model: its ``norm`` and ``final_norm`` are ``constant_std`` or ``none``; it is not changed.

    Returns:
        A model with ``norm`` and ``final_norm`` ``none`` and the logits of ``model`` (within 1e-5 in float32), of the
        same dtype, on the same device, in the same mode. Its unembedding is not tied, and has a bias if the final norm
        had one. Weights are folded in float64.

    Raises:
        InputError: a norm divides by each token's own std, is not a division, or is inside attention; or there is no
            norm to remove.
    """
    config = model.config
    norms = {"norm": config.norm, "final_norm": config.final_norm}
    if config.qk_norm != "none":
        raise InputError(
            f"qk_norm {config.qk_norm!r} divides each query and key by its own std, which no weight can hold; "
            "use a model without qk_norm"
        )
    if config.ffn == "spark":
        raise InputError(
            "ffn 'spark' reads the residual stream in two parts, whose weights cannot hold a norm of the whole; use a "
            "model with ffn dense or gated"
        )
    if set(norms.values()) == {"none"}:
        raise InputError("the model has no norm to remove: its norm and final_norm are none")
    for option, name in norms.items():
        if name in POINTWISE_NORMS:
            raise InputError(
                f"{option} {name!r} is {POINTWISE_NORMS[name]} and no division by a std: no weight can hold it, and it "
                "cannot be removed"
            )
        if name in SCALED_NORMS:
            raise InputError(
                f"{option} {name!r} divides by each token's own std, which no weight can hold; its constant "
                "1/sqrt(layer) could be folded, but norm removal takes plain layernorm and rmsnorm only"
            )
        if name not in (FOLDED, "none"):
            raise InputError(
                f"{option} {name!r} divides by each token's own std, which no weight can hold; "
                "fine-tune it to a constant first with `normfree remove-norm`"
            )
    folded_config = _without_norms(config)
    with torch.device(model.device), no_init_weights():
        folded: NormfreeForCausalLM = AutoModelForCausalLM.from_config(
            folded_config, dtype=model.dtype, attn_implementation=config._attn_implementation
        )
    folded.load_state_dict(_folded_weights(model, folded))
    folded.generation_config = model.generation_config
    return folded.train(model.training)


def _without_norms(config: NormfreeConfig) -> NormfreeConfig:
    """``norm`` and ``final_norm`` none, with the biases that take in those of norms."""
    options = {name: getattr(config, name) for name in NormfreeConfig.option_names()}
    options |= {"norm": "none", "final_norm": "none", "norm_is_centered": True}
    if config.norm == FOLDED and config.norm_is_centered:
        biased = set(BIASED_PROJECTIONS[config.attention_bias]) | set("qkv")
        options["attention_bias"] = next(name for name, each in BIASED_PROJECTIONS.items() if set(each) == biased)
        options["mlp_bias"] = True
    if config.final_norm == FOLDED:
        options["tie_word_embeddings"] = False
        options["lm_head_bias"] = config.lm_head_bias or config.norm_is_centered
    return NormfreeConfig(**options)


def _folded_weights(model: NormfreeForCausalLM, folded: NormfreeForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict of ``folded``; biases that come neither from ``model`` nor from a norm are zero."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if "_norm." not in name}
    for name, reader, norm, place in _readers(model):
        weight, bias = folded_reader(reader, norm, place)
        weights[f"{name}.weight"] = weight
        if bias is not None:
            weights[f"{name}.bias"] = bias
    expected = folded.state_dict()
    missing = {name: torch.zeros_like(expected[name]) for name in expected.keys() - weights.keys()}
    assert all(name.endswith(".bias") for name in missing), sorted(missing)
    return weights | missing


def _readers(model: NormfreeForCausalLM) -> list[tuple[str, nn.Linear, ConstantStdNorm, int]]:
    """Every linear map that reads the residual stream through a constant std: name, module, norm, place of its std."""
    found: list[tuple[str, nn.Module, int]] = []
    for layer, module in enumerate(model.model.blocks):
        assert isinstance(module, Block)
        block = f"model.blocks.{layer}"
        found += [(f"{block}.attention.{each}_proj", module.attention_norm, int(each == "v")) for each in "qkv"]
        readers = [each for each in ("gate_proj", "up_proj") if hasattr(module.ffn, each)]
        found += [(f"{block}.ffn.{each}", module.ffn_norm, 0) for each in readers]
    found.append(("lm_head", model.model.final_norm, 0))
    return [
        (name, cast(nn.Linear, model.get_submodule(name)), norm, place)
        for name, norm, place in found
        if isinstance(norm, ConstantStdNorm)
    ]


@torch.no_grad()
def folded_reader(reader: nn.Linear, norm: ConstantStdNorm, place: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(W', b')`` of the module's docstring, in the reader's dtype; ``b'`` is None without any bias."""
    weight = reader.weight.double()
    folded = weight * (norm.weight.double() / norm.std[place].double())
    if norm.is_centered:
        folded = folded - folded.mean(dim=1, keepdim=True)
    bias = None if reader.bias is None else reader.bias.double()
    if norm.bias is not None:
        shift = weight @ norm.bias.double()
        bias = shift if bias is None else bias + shift
    return folded.to(reader.weight.dtype), None if bias is None else bias.to(reader.weight.dtype)
