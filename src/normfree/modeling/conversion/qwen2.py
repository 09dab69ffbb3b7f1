"""Qwen2 (Yang et al. 2024) and Qwen2.5."""

from __future__ import annotations

from typing import Any

from normfree.modeling.conversion.family import Options, Weights, converts, window_options
from normfree.modeling.conversion.llama import converted_llama


@converts("qwen2", "Qwen2ForCausalLM")
def convert_qwen2(model: Any) -> tuple[Options, Weights]:
    """Llama's architecture with biases on queries, keys and values; layers may attend to a window."""
    return converted_llama(model, attention_bias="qkv", **window_options(model.config))
