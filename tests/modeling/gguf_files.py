"""Tiny models written as GGUF files the way llama.cpp converts them, an independent inverse of the reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 272
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
GEMMA: dict[str, Any] = {**SIZES, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 256}
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPE)),
    "llama, untied": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=ROPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128, rope_parameters=ROPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
}


def built(kind: str) -> PreTrainedModel:
    """A random model, its norms' gains and its biases too."""
    torch.manual_seed(0)
    model = BUILD[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.0 if "gemma" in kind else 0.5))
            assert name
    return model


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    quantized: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, Any] | None = None,
    left_out: str | None = None,
    more_tensors: dict[str, np.ndarray] | None = None,
    pre: str = "gpt-2",
    n_token: int = VOCABULARY,
) -> Path:
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if architecture.startswith(("gemma", "qwen3")):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    add: dict[type, Callable[[str, Any], None]]
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for key, value in (extra or {}).items():
        add[type(value)](key.replace("ARCH", architecture), value)
    _add_tokenizer(writer, n_token, pre)
    names = gguf.get_tensor_name_map(
        next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():
        if name == left_out:
            continue
        module, _, suffix = name.rpartition(".")
        stored = _stored(architecture, name, parameter.detach().numpy(), config)
        kind = None
        if quantized is not None and stored.ndim == 2:
            stored, kind = gguf.quantize(stored, quantized), quantized
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", stored, raw_dtype=kind)
    for name, tensor in (more_tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(architecture: str, name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    for projection, n_head in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if architecture == "llama" and projection in name:
            halves = tensor.reshape(n_head, 2, len(tensor) // n_head // 2, *tensor.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
    return tensor


def _add_tokenizer(writer: gguf.GGUFWriter, n_token: int, pre: str) -> None:
    """Bytes, and a few merges of spaces."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", *bytes_to_unicode().values(), "ĠĠ", "ĠĠĠ"]
    tokens += [f"<|more_{i}|>" for i in range(n_token - len(tokens))]
    special = [3 if token.startswith("<|") else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(special)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
