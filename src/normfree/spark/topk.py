"""The largest entries of each row: statistical top-k ("Spark Transformer", Section 3) and exact top-k, by name.

Statistical top-k finds about the k largest without sorting. Read as draws from a Gaussian, the entries of a row x ∈ R^d
exceed θ = mean(x) + std(x) · Φ⁻¹(1 − k/d) about k times. std is that of the population (divisor d), as in Gemma 3n's
released code; with divisor d − 1 the distance of θ from the mean would be longer by a share of 1/(2d). For Gaussian
entries the number above θ differs from k by O(√d) with high probability (the paper's Theorem 3.1); for others nothing
is promised.

Exact top-k takes the (k + 1)-th largest entry as θ, which needs a partial sort. It separates the effect of the
approximation from that of sparsity.

A new one is a soft threshold and a mask like these, and a line in ``TOPKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from normfree.spark.selection import (
    apply_threshold,
    at_least_float32,
    check_k,
    check_mask,
    count_of,
    keep_above,
)

_STANDARD_NORMAL = NormalDist()


def statistical_topk(x: Tensor, k: int | float, *, dim: int = -1) -> Tensor:
    """max(x − θ, 0) along ``dim``, with θ = mean + std · Φ⁻¹(1 − k/d): about k entries of each row stay above zero.

    Differentiable, through θ too; the derivative of the threshold at an entry that equals θ is taken as 0.

    - ``k`` = d keeps everything: the result is x itself, because Φ⁻¹(0) = −∞ would leave nothing finite.
    - ``k`` small: where θ lies above the largest entry the row is all zeros. A row's largest entry is at most √(d − 1)
      standard deviations above its mean.
    - A constant row (std 0) has nothing above its mean: zeros, up to the rounding of that mean; gradients are finite.
    - A row that holds a NaN or an infinity becomes NaN throughout, so that it cannot be taken for a sparse one.

    Args:
        x: of any float dtype; statistics and difference are float32 for half precision.
        k: how many of the d entries, 1 to d; or a float, their share in (0, 1].
        dim: the dimension that holds a row.

    Returns:
        Of the shape and dtype of ``x``.

    Raises:
        InputError: ``x`` has no such dimension or no float dtype, or k is out of range.
    """
    share = check_k(x, k, dim)
    if share == 1:
        return x.clone()
    std, mean = torch.std_mean(at_least_float32(x), dim=dim, keepdim=True, correction=0)
    return apply_threshold(x, mean + std * upper_quantile(share))


def statistical_topk_mask(x: Tensor, k: int | float, *, dim: int = -1, visible: Tensor | None = None) -> Tensor:
    """Which entries statistical top-k keeps: for attention, which puts −∞ in place of the others before its softmax.

    Mean, std and d are those of a row's visible entries alone. A row of at most k visible entries keeps them all, and
    every row keeps its largest visible entry, so that its softmax has one. A constant row keeps all that is visible;
    so does one with a NaN or an infinity among what is visible, which then meets the softmax. Has no gradient: a
    softmax over x − θ is that over x.

    Args:
        x, k, dim: as in :func:`statistical_topk`; k may exceed d, and a share is one of the visible entries.
        visible: bool, broadcastable to ``x``; default: everything.

    Returns:
        Bool, of the shape of ``x``.

    Raises:
        InputError: as :func:`statistical_topk`, and for ``visible`` of another dtype or shape.
    """
    check_mask(x, k, dim, visible)
    values = at_least_float32(x.detach())
    if visible is None:
        n_visible = torch.full_like(values.narrow(dim, 0, 1), values.shape[dim])
        seen = values
    else:
        visible = visible.expand_as(x)
        n_visible = visible.sum(dim=dim, keepdim=True).to(values.dtype)
        seen = values.masked_fill(~visible, 0.0)
    mean = seen.sum(dim=dim, keepdim=True) / n_visible
    deviation = seen - mean
    if visible is not None:
        deviation = deviation.masked_fill(~visible, 0.0)
    std = (deviation.square().sum(dim=dim, keepdim=True) / n_visible).sqrt()
    share = torch.full_like(n_visible, k) if isinstance(k, float) else k / n_visible
    # −Φ⁻¹(p) is Φ⁻¹(1 − p) without the rounding of 1 − p; from p = 1 on it is −∞, and all is kept
    threshold = mean - std * torch.special.ndtri(share.clamp_max(1.0))
    threshold = torch.where(share >= 1, -torch.inf, threshold)
    return keep_above(values, threshold, dim, visible)


@torch.compiler.assume_constant_result
def upper_quantile(share: float) -> float:
    """Φ⁻¹(1 − share), in double precision."""
    return -_STANDARD_NORMAL.inv_cdf(share)


def exact_topk(x: Tensor, k: int | float, *, dim: int = -1) -> Tensor:
    """max(x − θ, 0) along ``dim``, with θ the (k + 1)-th largest entry; differentiable, through θ too.

    Arguments, ``k`` = d, non-finite rows and errors are those of :func:`~normfree.spark.statistical_topk`; a share
    is rounded to the nearest count, at least 1. Of entries that tie with the (k + 1)-th none is kept, so that a
    constant row is all zeros.
    """
    check_k(x, k, dim)
    if count_of(k, x.shape[dim]) == x.shape[dim]:
        return x.clone()
    is_finite = x.isfinite().all(dim=dim, keepdim=True)
    return apply_threshold(x, torch.where(is_finite, _next_largest(x, k, dim), torch.nan))


def exact_topk_mask(x: Tensor, k: int | float, *, dim: int = -1, visible: Tensor | None = None) -> Tensor:
    """Which entries exact top-k keeps; arguments and rules are those of
    :func:`~normfree.spark.statistical_topk_mask`, a share being one of the whole row, visible or not.
    """
    check_mask(x, k, dim, visible)
    values = x.detach()
    if visible is not None:
        visible = visible.expand_as(x)
        values = values.masked_fill(~visible, -torch.inf)
    is_finite = (x.isfinite() if visible is None else x.isfinite() | ~visible).all(dim=dim, keepdim=True)
    threshold = torch.where(is_finite, _next_largest(values, k, dim), torch.nan)
    return keep_above(values, threshold, dim, visible)


def _next_largest(values: Tensor, k: int | float, dim: int) -> Tensor:
    """The (k + 1)-th largest entry of each row; −∞ if there is none."""
    count = count_of(k, values.shape[dim])
    if count >= values.shape[dim]:
        return torch.full_like(values.narrow(dim, 0, 1), -torch.inf)
    return values.topk(count + 1, dim=dim).values.narrow(dim, count, 1)


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
"""Ways to keep the k largest entries of a row, by the name that ``NormfreeConfig.topk`` gives."""
