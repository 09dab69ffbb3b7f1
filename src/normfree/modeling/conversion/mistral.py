"""Mistral 7B (Jiang et al. 2023)."""

from __future__ import annotations

from typing import Any

from normfree.errors import InputError
from normfree.modeling.conversion.family import Options, Weights, converts
from normfree.modeling.conversion.llama import converted_llama
from normfree.modeling.layer_types import FULL, SLIDING


@converts("mistral", "MistralForCausalLM")
def convert_mistral(model: Any) -> tuple[Options, Weights]:
    """Llama's architecture; with ``sliding_window`` every layer attends to a window, whatever ``layer_types`` says."""
    hf = model.config
    kind = FULL if hf.sliding_window is None else SLIDING
    kinds = getattr(hf, "layer_types", None)
    if kinds is not None and set(kinds) != {kind}:
        raise InputError(
            f"from_hf: layer_types = {kinds} with sliding_window = {hf.sliding_window}, which MistralForCausalLM does "
            f"not follow: its masks are all of kind {kind}; only that can be converted"
        )
    return converted_llama(model, sliding_window=hf.sliding_window)
