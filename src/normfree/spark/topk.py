"""Top-k by name. A new one is a soft threshold and a mask like the statistical ones, and a line in ``TOPKS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from normfree.spark.exact_topk import exact_topk, exact_topk_mask
from normfree.spark.statistical_topk import statistical_topk, statistical_topk_mask


@dataclass(frozen=True)
class TopK:
    """One way to find the k largest entries of each row.

    soft_threshold: as :func:`~normfree.spark.statistical_topk`; mask: as
    :func:`~normfree.spark.statistical_topk_mask`.
    """

    soft_threshold: Callable[..., Tensor]
    mask: Callable[..., Tensor]


TOPKS = {
    "statistical": TopK(statistical_topk, statistical_topk_mask),
    "exact": TopK(exact_topk, exact_topk_mask),
}
