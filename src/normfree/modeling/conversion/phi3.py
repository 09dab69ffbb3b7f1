"""Phi-3 (Abdin et al. 2024)."""

from __future__ import annotations

from typing import Any

from normfree.modeling.conversion.family import Options, Weights, converts, renamed, split_fused
from normfree.modeling.conversion.llama import LLAMA_NAMES, llama_options


@converts("phi3", "Phi3ForCausalLM")
def convert_phi3(model: Any) -> tuple[Options, Weights]:
    """Llama's architecture with one fused W_qkv and one fused W_gate,up; a part of each head may rotate.

    ``embd_pdrop`` is an option of the configuration that the model does not read.
    """
    hf = model.config
    options = {**llama_options(model), "residual_dropout": hf.resid_pdrop, "sliding_window": hf.sliding_window}
    head_dim = options["head_dim"] or hf.hidden_size // hf.num_attention_heads
    sizes = [n_head * head_dim for n_head in (hf.num_attention_heads, hf.num_key_value_heads, hf.num_key_value_heads)]
    weights = split_fused(renamed(model, LLAMA_NAMES), lambda fused: list(fused.split(sizes)))
    return options, split_fused(weights, lambda fused: list(fused.chunk(2)), "gate_up_proj", ("gate_proj", "up_proj"))
