"""Activation sparsity ("Spark Transformer", 2025): the largest entries of a row, and what skipping the others saves."""

from normfree.spark.exact_topk import exact_topk, exact_topk_mask
from normfree.spark.statistical_topk import statistical_topk, statistical_topk_mask
from normfree.spark.topk import TOPKS, TopK

__all__ = [
    "TOPKS",
    "TopK",
    "exact_topk",
    "exact_topk_mask",
    "statistical_topk",
    "statistical_topk_mask",
]
