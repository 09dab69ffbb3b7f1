"""Reading finished models: what each head attends to, how signals propagate, what low precision costs."""

from normfree.interpret.attention_entropy import (
    AttentionEntropy,
    MeasuredModel,
    load_measured_model,
    measure_attention_entropy,
    token_sequences,
    tokenizer_of,
    write_attention_entropy,
)
from normfree.interpret.quantization import PRECISIONS, check_quantization, quantization_cost, quantized
from normfree.interpret.signal_propagation import measure_signal_propagation

__all__ = [
    "PRECISIONS",
    "AttentionEntropy",
    "MeasuredModel",
    "check_quantization",
    "load_measured_model",
    "measure_attention_entropy",
    "measure_signal_propagation",
    "quantization_cost",
    "quantized",
    "token_sequences",
    "tokenizer_of",
    "write_attention_entropy",
]
