"""Phi-3 (Abdin et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.conversion.family import Converted, converts
from normfree.modeling.conversion.llama import LLAMA_NAMES, llama_options
from normfree.modeling.conversion.weights import renamed, split_fused


@converts("phi3", "Phi3ForCausalLM")
def convert_phi3(model: Any) -> Converted:
    """Llama's architecture with one fused W_qkv and one fused W_gate,up; a part of each head may rotate.

    ``embd_pdrop`` is an option of the configuration that the model does not read.
    """
    hf = model.config
    config = NormfreeConfig(**llama_options(model), residual_dropout=hf.resid_pdrop, sliding_window=hf.sliding_window)
    keys = config.n_kv_head * config.head_dim
    sizes = [config.n_head * config.head_dim, keys, keys]

    def split(fused: torch.Tensor) -> list[torch.Tensor]:
        return list(fused.split(sizes))

    weights = split_fused(renamed(model, LLAMA_NAMES), split)
    return config, split_fused(weights, lambda fused: list(fused.chunk(2)), "gate_up_proj", ("gate_proj", "up_proj"))
