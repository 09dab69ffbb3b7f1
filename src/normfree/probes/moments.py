"""Central moments, up to the fourth, of a stream of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CentralMoments:
    """n numbers with mean μ and M_p = Σ (x − μ)^p, p = 2, 3, 4: float64 of one shape, [] for a single stream.

    ``+`` joins two streams by the pairwise formulas of Pébay ("Formulas for Robust, One-Pass Parallel Computation of
    Covariances and Arbitrary-Order Statistical Moments", 2008, Eqs. 2.1, 3.1). Sums of raw powers would cancel where
    the mean is large.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    @classmethod
    def of(cls, x: Tensor, *, scratch: Tensor | None = None) -> CentralMoments:
        """The moments of all entries of ``x``, float64 of any shape.

        With a ``scratch`` of its shape and dtype no memory is allocated, and both are overwritten.
        """
        mean = x.mean()
        deviations = torch.sub(x, mean, out=None if scratch is None else x).flatten()
        squares = torch.mul(deviations, deviations, out=None if scratch is None else scratch.view(-1))
        n = torch.full_like(mean, x.numel())
        return cls(n, mean, squares.sum(), squares @ deviations, squares @ squares)

    def __add__(self, other: CentralMoments) -> CentralMoments:
        n_a, n_b = self.n, other.n
        n = n_a + n_b
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + delta**2 * (n_a * n_b / n)
        m3 = (
            self.m3
            + other.m3
            + delta**3 * (n_a * n_b * (n_a - n_b) / n**2)
            + 3 * delta * (n_a * other.m2 - n_b * self.m2) / n
        )
        m4 = (
            self.m4
            + other.m4
            + delta**4 * (n_a * n_b * (n_a**2 - n_a * n_b + n_b**2) / n**3)
            + 6 * delta**2 * (n_a**2 * other.m2 + n_b**2 * self.m2) / n**2
            + 4 * delta * (n_a * other.m3 - n_b * self.m3) / n
        )
        return CentralMoments(n, self.mean + delta * (n_b / n), m2, m3, m4)

    def excess_kurtosis(self) -> Tensor:
        """n M₄ / M₂² − 3: 0 for a normal distribution; NaN if all numbers are equal or one is not finite."""
        return self.n * self.m4 / self.m2**2 - 3

    def packed(self) -> Tensor:
        """Float64 [..., 5]; n is exact up to 2⁵³."""
        return torch.stack([self.n, self.mean, self.m2, self.m3, self.m4], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> CentralMoments:
        """The inverse of :meth:`packed`."""
        return cls(*packed.unbind(-1))
