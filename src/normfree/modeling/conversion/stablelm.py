"""StableLM and Stable LM 2 (Bellagente et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from normfree.modeling.conversion.family import Options, Weights, converts, renamed, require, with_own_ffn_norm
from normfree.modeling.conversion.llama import LLAMA_NAMES, llama_options

NAMES = {**LLAMA_NAMES, ".q_layernorm.norms.": ".q_norm.", ".k_layernorm.norms.": ".k_norm."}


@converts("stablelm", "StableLmForCausalLM")
def convert_stablelm(model: Any) -> tuple[Options, Weights]:
    """Llama's architecture with LayerNorm, where a part of each head rotates.

    With ``use_parallel_residual`` attention and feed-forward network read one LayerNorm; here each reads its own copy.
    ``hidden_dropout`` acts on the feed-forward network only, which Normfree has no option for.
    """
    hf = model.config
    require(hf, hidden_dropout=0.0)
    options = {
        **llama_options(model),
        "norm": "layernorm",
        "final_norm": "layernorm",
        "norm_eps": hf.layer_norm_eps,
        "attention_bias": "qkv" if hf.use_qkv_bias else "none",
        "qk_norm": "layernorm_per_head" if hf.qk_layernorm else "none",
        "parallel_residual": hf.use_parallel_residual,
    }
    weights = _stacked(renamed(model, NAMES))
    return options, with_own_ffn_norm(weights) if hf.use_parallel_residual else weights


def _stacked(weights: Weights) -> Weights:
    """The gains of the heads, one tensor [head_dim] each, as one tensor [heads head_dim]."""
    gains: dict[str, list[torch.Tensor]] = {}
    others = {}
    for name, tensor in weights.items():
        stem, found, rest = name.partition("_norm.")
        if found and stem.endswith((".q", ".k")):
            gains.setdefault(f"{stem}_norm.weight", []).append(tensor)
            assert rest.endswith(".weight"), "these norms have no bias"
        else:
            others[name] = tensor
    return others | {name: torch.cat(each) for name, each in gains.items()}
