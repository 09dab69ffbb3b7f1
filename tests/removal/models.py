"""Small random models whose norms have constant stds, made from stock GPT-2, GPT-NeoX and Llama models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf
from normfree.removal.schedule import RemovalSchedule, automatic_schedule

VOCAB = 43
LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB, "hidden_size": 32}
STOCK: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**LAYERS, n_positions=24, bos_token_id=1, eos_token_id=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**LAYERS, intermediate_size=48, max_position_embeddings=24, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**LAYERS, intermediate_size=40, num_key_value_heads=2, max_position_embeddings=24)
    ),
}

ROPE = {"rope_theta": 1e4}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "GPT-NeoX": {
        "position": "rotary",
        "rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5},
        "parallel_residual": True,
    },
    "Llama": {
        "position": "rotary",
        "ffn": "gated",
        "activation": "silu",
        "norm_is_centered": False,
        "attention_bias": "none",
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "n_kv_head": 2,
    },
}
"""What a model of each family has, beside sizes; all else is as in GPT-2."""


def perturbed(model: Any, std: float = 0.2) -> Any:
    """The model with noise on every parameter, so that no bias is zero and no gain one, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def stock(name: str) -> Any:
    torch.manual_seed(0)
    return perturbed(STOCK[name]())


def constant_std(model: NormfreeForCausalLM, **changes: Any) -> NormfreeForCausalLM:
    """``model`` with random constant stds, and options changed, in place of its norms."""
    config = model.config
    options = {name: getattr(config, name) for name in NormfreeConfig.option_names()}
    kinds = [each for each in (config.norm, config.final_norm) if each != "none"]
    options |= {"norm_is_centered": kinds[0] != "rmsnorm"}
    options |= {"final_norm_is_centered": kinds[-1] != "rmsnorm"} if config.final_norm != "none" else {}
    options |= {name: "constant_std" for name in ("norm", "final_norm") if options[name] != "none"}
    constant = NormfreeForCausalLM(NormfreeConfig(**options | changes)).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in constant.state_dict()}
    constant.load_state_dict(weights, strict=False)
    set_stds(constant)
    return constant


def set_stds(model: NormfreeForCausalLM) -> None:
    """Random constant stds."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("_norm.std"):
            buffer.copy_(0.5 + 2 * torch.rand(buffer.shape, generator=generator))


def constant_std_of(name: str) -> NormfreeForCausalLM:
    return constant_std(from_hf(stock(name)))


def constant_std_with(options: dict[str, Any]) -> NormfreeForCausalLM:
    """A small float64 model with constant stds and these options, all its weights random."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": VOCAB}
    norms = {"norm": "constant_std", "final_norm": "constant_std"}
    torch.manual_seed(0)
    model: NormfreeForCausalLM = perturbed(NormfreeForCausalLM(NormfreeConfig(**{**sizes, **norms, **options})))
    set_stds(model)
    return model.double()


def tokens(n: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(2))


def scheduled(**options: Any) -> RemovalSchedule:
    """The automatic schedule of a model of three layers without its auxiliary loss, but with ``options``."""
    content = automatic_schedule(3, 300).model_dump() | {"std_loss_weight": 0.0} | options
    return RemovalSchedule.model_validate(content)
