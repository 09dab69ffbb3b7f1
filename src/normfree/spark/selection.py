"""Shared by every top-k: checks of k, the soft threshold, and which entries a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.errors import InputError


def check_k(x: Tensor, k: int | float, dim: int) -> float:
    """k as a share of the d entries along ``dim``.

    Raises:
        InputError: there is no such dimension, x has no float dtype, or k is no count from 1 to d or share in (0, 1].
    """
    d = _length(x, dim)
    check_active("k", k, d)
    return float(k) if isinstance(k, float) else k / d


def check_mask(x: Tensor, k: int | float, dim: int, visible: Tensor | None) -> None:
    """Checks the arguments of a mask: as :func:`check_k`, but a count may be larger than the row.

    Raises:
        InputError: as :func:`check_k`, or ``visible`` is no bool mask broadcastable to ``x``.
    """
    _length(x, dim)
    check_active("k", k, None)
    if visible is None:
        return
    shapes = zip(visible.shape[::-1], x.shape[::-1], strict=False)
    if visible.dtype != torch.bool or visible.dim() > x.dim() or any(a not in (1, b) for a, b in shapes):
        raise InputError(
            f"visible must be a bool mask broadcastable to {list(x.shape)}, got {visible.dtype} {list(visible.shape)}"
        )


def check_active(name: str, active: int | float, size: int | None) -> None:
    """Checks that ``active`` is a count from 1 to ``size`` (if not None) or, as a float, a share in (0, 1].

    Raises:
        InputError: it is not; the message calls it ``name``.
    """
    if isinstance(active, float):
        if not 0 < active <= 1:
            raise InputError(f"{name} is {active}; a float is a share and must be in (0, 1], an int is a count")
    elif isinstance(active, bool) or not isinstance(active, int):
        raise InputError(f"{name} is {active!r}; give a count (int) or a share in (0, 1] (float)")
    elif active < 1 or (size is not None and active > size):
        allowed = "at least 1" if size is None else f"1 to {size}"
        raise InputError(f"{name} is {active}; as a count it must be {allowed} (a float is a share)")


def count_of(active: int | float, size: int) -> int:
    """A share as a count of ``size``, rounded and at least 1; a count unchanged."""
    return max(1, round(active * size)) if isinstance(active, float) else active


def apply_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """max(x − threshold, 0) in the dtype of x; NaN where one of them is. The difference is float32 at least."""
    values = x if x.dtype == threshold.dtype else x.to(threshold.dtype)
    if values.dtype.itemsize < torch.float32.itemsize:
        values, threshold = values.float(), threshold.float()
    return (values - threshold).clamp_min(0.0).to(x.dtype)


def keep_above(values: Tensor, threshold: Tensor, dim: int, visible: Tensor | None) -> Tensor:
    """Bool: visible entries above the threshold of their row, its largest visible ones, and all if it is NaN."""
    seen = values if visible is None else values.masked_fill(~visible, -torch.inf)
    # "not at or below", so that a NaN threshold keeps everything
    keep = ~(values <= threshold) | (values == seen.amax(dim=dim, keepdim=True))
    return keep if visible is None else keep & visible


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _length(x: Tensor, dim: int) -> int:
    if not x.is_floating_point():
        raise InputError(f"x must have a float dtype, got {x.dtype}; convert it first")
    if not -x.dim() <= dim < x.dim():
        raise InputError(f"dim is {dim}, but x has the shape {list(x.shape)}")
    if x.shape[dim] == 0:
        raise InputError(f"x has no entries along dim {dim}: its shape is {list(x.shape)}")
    return x.shape[dim]
