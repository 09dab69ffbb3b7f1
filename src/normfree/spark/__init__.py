"""Activation sparsity ("Spark Transformer", 2025): the largest entries of a row, and what skipping the others saves."""

from normfree.spark.decoding import sparse_decode
from normfree.spark.from_dense import to_spark
from normfree.spark.topk import TOPKS, TopK, exact_topk, exact_topk_mask, statistical_topk, statistical_topk_mask

__all__ = [
    "TOPKS",
    "TopK",
    "exact_topk",
    "exact_topk_mask",
    "sparse_decode",
    "statistical_topk",
    "statistical_topk_mask",
    "to_spark",
]
