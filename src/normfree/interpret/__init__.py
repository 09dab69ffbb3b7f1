"""Reading finished models: what heads attend to and write, how signals propagate, what low precision costs."""

from normfree.interpret.confidence_neurons import (
    confidence_neuron_candidates,
    neuron_ablation_effects,
    neuron_output_weights,
)
from normfree.interpret.depth import (
    DepthComparison,
    DepthMeasurement,
    EffectiveDepth,
    compare_depth,
    effective_depth,
    fit_growth,
    measure_angular_distance,
    measure_depth,
    most_similar_block,
    write_depth,
)
from normfree.interpret.direct_logit_attribution import (
    DirectAttributionErrors,
    LogitAttribution,
    direct_attribution_errors,
    direct_effects,
    direct_logit_attribution,
    mean_final_std,
)
from normfree.interpret.head_entropy import AttentionEntropy, measure_attention_entropy, write_attention_entropy
from normfree.interpret.interpretability import InterpretabilityComparison, compare_interpretability, interpret_model
from normfree.interpret.patching import (
    PatchingAgreement,
    PromptPairs,
    agreement,
    logit_difference,
    patch_heads,
    patch_residual_stream,
)
from normfree.interpret.prompts import induction_pairs, read_prompts
from normfree.interpret.pruning import export_pruned, prune_layers
from normfree.interpret.quantization import PRECISIONS, check_quantization, quantization_cost, quantized
from normfree.interpret.sequences import (
    NoTokenizerError,
    TokenSequences,
    check_same_tokens,
    token_sequences,
    tokenizer_of,
)
from normfree.interpret.signal_propagation import measure_signal_propagation
from normfree.interpret.sinks import attention_sinks, residual_std_by_position

__all__ = [
    "PRECISIONS",
    "AttentionEntropy",
    "DepthComparison",
    "DepthMeasurement",
    "DirectAttributionErrors",
    "EffectiveDepth",
    "InterpretabilityComparison",
    "LogitAttribution",
    "NoTokenizerError",
    "PatchingAgreement",
    "PromptPairs",
    "TokenSequences",
    "agreement",
    "attention_sinks",
    "check_quantization",
    "check_same_tokens",
    "compare_depth",
    "compare_interpretability",
    "confidence_neuron_candidates",
    "direct_attribution_errors",
    "direct_effects",
    "direct_logit_attribution",
    "effective_depth",
    "export_pruned",
    "fit_growth",
    "induction_pairs",
    "interpret_model",
    "logit_difference",
    "mean_final_std",
    "measure_angular_distance",
    "measure_attention_entropy",
    "measure_depth",
    "measure_signal_propagation",
    "most_similar_block",
    "neuron_ablation_effects",
    "neuron_output_weights",
    "patch_heads",
    "patch_residual_stream",
    "prune_layers",
    "quantization_cost",
    "quantized",
    "read_prompts",
    "residual_std_by_position",
    "token_sequences",
    "tokenizer_of",
    "write_attention_entropy",
    "write_depth",
]
