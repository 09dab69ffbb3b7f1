"""Normfree: what normalization, activations and sparsity do to a transformer language model."""

from normfree.quiet import quiet_imports

with quiet_imports():
    from normfree.entropy import attention_entropy, entropy_bands
    from normfree.modeling import NormfreeConfig, NormfreeForCausalLM, from_hf, sparse_decode
    from normfree.probes import EntropyMonitor, EntropyProbe
    from normfree.probes.trainer_callback import EntropyCallback
    from normfree.removal import remove_norms, to_stock
    from normfree.sparsity import statistical_topk

__all__ = [
    "EntropyCallback",
    "EntropyMonitor",
    "EntropyProbe",
    "NormfreeConfig",
    "NormfreeForCausalLM",
    "attention_entropy",
    "entropy_bands",
    "from_hf",
    "remove_norms",
    "sparse_decode",
    "statistical_topk",
    "to_stock",
]
__version__ = "0.1.0"
