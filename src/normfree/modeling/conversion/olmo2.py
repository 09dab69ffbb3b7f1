"""OLMo 2 ("2 OLMo 2 Furious", 2025)."""

from __future__ import annotations

from typing import Any

from normfree.modeling.conversion.family import Options, Weights, converts
from normfree.modeling.conversion.llama import LLAMA_NAMES, converted_llama

NAMES = {
    **LLAMA_NAMES,
    ".post_attention_layernorm.": ".attention_norm.",
    ".post_feedforward_layernorm.": ".ffn_norm.",
}


@converts("olmo2", "Olmo2ForCausalLM")
def convert_olmo2(model: Any) -> tuple[Options, Weights]:
    """Llama's architecture with reordered norm and an RMSNorm over all heads of queries and of keys."""
    return converted_llama(model, NAMES, norm_placement="reordered", qk_norm="rmsnorm_full_width")
