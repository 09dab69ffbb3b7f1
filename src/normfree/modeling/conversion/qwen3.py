"""Qwen3 (Yang et al. 2025)."""

from __future__ import annotations

from typing import Any

from normfree.modeling.conversion.family import Options, Weights, converts, window_options
from normfree.modeling.conversion.llama import converted_llama


@converts("qwen3", "Qwen3ForCausalLM")
def convert_qwen3(model: Any) -> tuple[Options, Weights]:
    """Llama's architecture with an RMSNorm over each head's queries and keys; layers may attend to a window."""
    return converted_llama(model, qk_norm="rmsnorm", **window_options(model.config))
