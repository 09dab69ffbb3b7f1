"""Bands of a model's head entropies, and the entropy of uniform attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfree.entropy.visibility import visible_range
from normfree.errors import InputError

MAXIMUM_SLACK = 1e-5
"""Relative excess over a given maximum that counts as rounding."""


def entropy_bands(entropy: Tensor | NDArray[Any] | Sequence[Any], maximum: float | None = None) -> NDArray[np.float64]:
    """Shares of heads in the quarters of the entropy range (ReLU's Revival, section 3 and Figure 2a).

    Args:
        entropy: the entropy of every head in nats, of any shape.
        maximum: in nats; None means the largest finite value of ``entropy``. The paper's is the largest over all heads
            of all configurations compared.

    Returns:
        float64 [4], shares of ALL heads in [0, max/4), [max/4, max/2), [max/2, 3max/4) and [3max/4, max]; the last is
        the paper's entropic overload. Heads with NaN entropy are in no band, so shares may sum to less than 1.

    Raises:
        InputError: no heads, a negative entropy, a value above ``maximum``, or a maximum that is not positive.
    """
    array = entropy.detach().cpu().double().numpy() if isinstance(entropy, Tensor) else entropy
    values = np.asarray(array, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    if values.size == 0:
        raise InputError("entropy_bands needs the entropy of at least one head, got none")
    if finite.size == 0 and maximum is None:
        return np.zeros(4)
    if finite.size and finite.min() < 0:
        raise InputError(f"entropy cannot be negative, got {finite.min():.4g} nats")
    top = float(finite.max()) if maximum is None else float(maximum)
    if not (math.isfinite(top) and top > 0):
        raise InputError(f"the maximum of the entropy bands must be a positive number of nats, got {top}")
    if finite.size and finite.max() > top * (1 + MAXIMUM_SLACK):
        raise InputError(
            f"an entropy of {finite.max():.4g} nats is above maximum={top:.4g}; "
            "pass the maximum over all heads that are compared"
        )
    band = np.searchsorted(top * np.array([0.25, 0.5, 0.75]), finite, side="right")
    return np.bincount(band, minlength=4) / values.size


def uniform_entropy_bound(
    n_query: int,
    n_key: int | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    *,
    has_sink: bool = False,
) -> float:
    """The largest entropy of a head, in nats: mean over the queries of ln(number of visible keys).

    For 128 causal positions it is mean over i of ln(i) = 3.878.

    Args:
        n_query: number of queries; they are the last positions of the keys'.
        n_key: number of keys; None means ``n_query``.
        is_causal: a query sees no key after its own position.
        sliding_window: number of keys a query sees, as in :func:`normfree.entropy.attention_entropy`.
        has_sink: a learned sink joins every softmax, as one more key.

    Raises:
        InputError: a size or window below 1, or causal attention with fewer keys than queries.
    """
    n_key = n_query if n_key is None else n_key
    if n_query < 1 or n_key < 1:
        raise InputError(f"n_query and n_key must be at least 1, got {n_query} and {n_key}")
    first, last = visible_range(n_query, n_key, is_causal=is_causal, sliding_window=sliding_window)
    return float((last - first + has_sink).to(torch.float64).log().mean())
