"""Exact entropy of attention, in memory linear in the number of keys."""

from normfree.entropy.distribution import entropy_bands, uniform_entropy_bound
from normfree.entropy.fused import BACKENDS, attention_entropy, select_backend
from normfree.entropy.nonfinite_scores import NonFiniteCount, count_nonfinite_scores
from normfree.entropy.reference import attention_entropy_reference
from normfree.entropy.with_output import attention_and_entropy

__all__ = [
    "BACKENDS",
    "NonFiniteCount",
    "attention_and_entropy",
    "attention_entropy",
    "attention_entropy_reference",
    "count_nonfinite_scores",
    "entropy_bands",
    "select_backend",
    "uniform_entropy_bound",
]
