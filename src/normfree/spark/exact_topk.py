"""Exact top-k with the semantics of the statistical one, to tell what the approximation does from what sparsity does.

θ is the (k + 1)-th largest entry of a row: exactly the k largest lie above it, and they are left with what they have
over it. Needs a partial sort, which is what statistical top-k avoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.spark.selection import apply_threshold, check_k, check_mask, count_of, keep_above


def exact_topk(x: Tensor, k: int | float, *, dim: int = -1) -> Tensor:
    """max(x − θ, 0) along ``dim``, with θ the (k + 1)-th largest entry; differentiable, through θ too.

    Arguments, ``k`` = d, non-finite rows and errors are those of :func:`~normfree.spark.statistical_topk`; a share
    is rounded to the nearest count, at least 1. Of entries that tie with the (k + 1)-th none is kept, so that a
    constant row is all zeros.
    """
    share = check_k(x, k, dim)
    if share == 1:
        return x.clone()
    count = count_of(k, x.shape[dim])
    if count == x.shape[dim]:
        return x.clone()
    threshold = x.topk(count + 1, dim=dim).values.narrow(dim, count, 1)
    is_finite = x.isfinite().all(dim=dim, keepdim=True)
    return apply_threshold(x, torch.where(is_finite, threshold, torch.nan))


def exact_topk_mask(x: Tensor, k: int | float, *, dim: int = -1, visible: Tensor | None = None) -> Tensor:
    """Which entries exact top-k keeps; arguments and rules are those of
    :func:`~normfree.spark.statistical_topk_mask`, a share being one of the whole row, visible or not.
    """
    check_mask(x, k, dim, visible)
    values, d = x.detach(), x.shape[dim]
    if visible is not None:
        visible = visible.expand_as(x)
        values = values.masked_fill(~visible, -torch.inf)
    count = count_of(k, d)
    if count >= d:
        threshold = torch.full_like(values.narrow(dim, 0, 1), -torch.inf)
    else:
        threshold = values.topk(count + 1, dim=dim).values.narrow(dim, count, 1)
    is_finite = (x.isfinite() if visible is None else x.isfinite() | ~visible).all(dim=dim, keepdim=True)
    return keep_above(values, torch.where(is_finite, threshold, torch.nan), dim, visible)
