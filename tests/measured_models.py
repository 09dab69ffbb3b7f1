"""Tiny random models, and a tokenizer, for the tests of ``normfree.measure`` and of ``normfree entropy``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import normfree
from normfree.data import train_tokenizer
from tests.data.made_up import document

VOCABULARY = 300
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
COMMON: dict[str, Any] = {"initializer_range": 0.5, **TOKENS}
NARROW: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, **COMMON}
WIDE: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32, **COMMON}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, **WIDE}

MODELS = {
    "gpt2": lambda n_positions: GPT2LMHeadModel(GPT2Config(**NARROW, n_positions=n_positions)),
    "llama": lambda n_positions: LlamaForCausalLM(
        LlamaConfig(**GROUPED, num_hidden_layers=3, max_position_embeddings=n_positions)
    ),
    "normfree": lambda n_positions: normfree.NormfreeForCausalLM(
        normfree.NormfreeConfig(**NARROW, n_positions=n_positions)
    ),
    "bidirectional": lambda _: BertLMHeadModel(BertConfig(**WIDE, num_hidden_layers=2)),
    "windows": lambda _: MistralForCausalLM(MistralConfig(**GROUPED, num_hidden_layers=2, sliding_window=4)),
    "two kinds": lambda _: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=4,
        )
    ),
}


def build(name: str, n_positions: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name](n_positions)


def tokenizer_of(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerBase:
    return train_tokenizer((document(seed) for seed in range(40)), vocabulary)
