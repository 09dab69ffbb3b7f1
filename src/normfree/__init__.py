"""Normfree: what normalization, activations and sparsity do to a transformer language model."""

from normfree.quiet import quiet_imports

with quiet_imports():
    from normfree import plot
    from normfree.entropy import attention_entropy, entropy_bands
    from normfree.measurement import Measurement, measure
    from normfree.modeling import NormfreeConfig, NormfreeForCausalLM, from_hf, sparse_decode
    from normfree.probes import EntropyMonitor, EntropyProbe
    from normfree.probes.trainer_callback import EntropyCallback
    from normfree.removal import remove_norms, to_stock
    from normfree.sparsity import statistical_topk
    from normfree.studies import StudyResult, load_study, run_study

__all__ = [
    "EntropyCallback",
    "EntropyMonitor",
    "EntropyProbe",
    "Measurement",
    "NormfreeConfig",
    "NormfreeForCausalLM",
    "StudyResult",
    "attention_entropy",
    "entropy_bands",
    "from_hf",
    "load_study",
    "measure",
    "plot",
    "remove_norms",
    "run_study",
    "sparse_decode",
    "statistical_topk",
    "to_stock",
]
__version__ = "0.1.0"
