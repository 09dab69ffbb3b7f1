"""Small random models of stock architectures and of ours, with weights of a size that matters."""

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from normfree import NormfreeConfig, NormfreeForCausalLM

VOCAB_SIZE = 50
N_LAYER = 5
SIZES = {"num_hidden_layers": N_LAYER, "num_attention_heads": 4, "hidden_size": 16, "vocab_size": VOCAB_SIZE}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}

STOCK = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {**SIZES, "n_positions": 32}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {**SIZES, "intermediate_size": 24}),
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**GROUPED, "head_dim": 4, **SLIDING}),
    "mistral": (MistralConfig, MistralForCausalLM, {**GROUPED, "sliding_window": 6}),
}


def stock(name, **overrides):
    config_class, model_class, options = STOCK[name]
    torch.manual_seed(0)
    return model_class(config_class(**{"initializer_range": 0.2, **options, **overrides})).eval()


def ours(**options):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": N_LAYER, "n_head": 4, "n_embd": 16, "vocab_size": VOCAB_SIZE, "n_positions": 32}
    return NormfreeForCausalLM(NormfreeConfig(**{**sizes, "initializer_range": 0.2, **options})).eval()


def tokens(*shape, seed=0):
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
