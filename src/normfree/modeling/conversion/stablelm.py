"""StableLM and Stable LM 2 (Bellagente et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.conversion.family import Converted, converts
from normfree.modeling.conversion.llama import LLAMA_NAMES, llama_options
from normfree.modeling.conversion.options import require
from normfree.modeling.conversion.weights import renamed


@converts("stablelm", "StableLmForCausalLM")
def convert_stablelm(model: Any) -> Converted:
    """Llama's architecture with LayerNorm, where a part of each head rotates.

    With ``use_parallel_residual`` attention and feed-forward network read one LayerNorm; here each reads a copy of its
    own. ``hidden_dropout`` acts on the feed-forward network alone, which Normfree has no option for.
    """
    hf = model.config
    require(hf, hidden_dropout=0.0)
    config = NormfreeConfig(
        **{
            **llama_options(model),
            "norm": "layernorm",
            "final_norm": "layernorm",
            "norm_eps": hf.layer_norm_eps,
            "attention_bias": "qkv" if hf.use_qkv_bias else "none",
            "qk_norm": "layernorm_per_head" if hf.qk_layernorm else "none",
            "parallel_residual": hf.use_parallel_residual,
        }
    )
    weights = renamed(model, {**LLAMA_NAMES, ".q_layernorm.norms.": ".q_norm.", ".k_layernorm.norms.": ".k_norm."})
    for name in list(weights):
        if hf.use_parallel_residual and ".attention_norm." in name:
            weights[name.replace(".attention_norm.", ".ffn_norm.")] = weights[name]
    return config, _stacked(weights)


def _stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
