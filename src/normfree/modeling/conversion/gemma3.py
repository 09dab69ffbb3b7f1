"""Gemma 3, its text models (Gemma Team 2025)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from normfree.errors import InputError
from normfree.modeling.conversion.family import Options, Weights, converts
from normfree.modeling.conversion.gemma2 import gemma_options, gemma_weights
from normfree.modeling.conversion.llama import check_whole_heads_rotate


@converts("gemma3", "Gemma3ForCausalLM")
def convert_gemma3(model: Any) -> tuple[Options, Weights]:
    """Gemma 2 with an RMSNorm over each head's queries and keys, and rotary parameters by kind of layer."""
    hf = model.config
    if hf.attn_logit_softcapping is not None:
        raise InputError(
            f"from_hf: attn_logit_softcapping = {hf.attn_logit_softcapping}, which Gemma3ForCausalLM does not follow; "
            "only None can be converted"
        )
    sets = {kind: hf.rope_parameters[kind] for kind in dict.fromkeys(hf.layer_types)}
    check_whole_heads_rotate(model, *(parameters for parameters in sets.values() if parameters is not None))
    options = {**gemma_options(model), "rope_parameters": deepcopy(sets), "qk_norm": "rmsnorm"}
    return options, gemma_weights(model)
