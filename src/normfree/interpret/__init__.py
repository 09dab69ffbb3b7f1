"""Reading finished models: what each head attends to."""

from normfree.interpret.attention_entropy import (
    AttentionEntropy,
    MeasuredModel,
    load_measured_model,
    measure_attention_entropy,
    token_sequences,
    write_attention_entropy,
)

__all__ = [
    "AttentionEntropy",
    "MeasuredModel",
    "load_measured_model",
    "measure_attention_entropy",
    "token_sequences",
    "write_attention_entropy",
]
