"""Moments of a stream against SciPy in float64 on the whole of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from normfree.probes.moments import CentralMoments


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    scale=st.floats(-30, 30).map(lambda power: 10.0**power),
    offset=st.floats(-1e4, 1e4),
)
def test_parts_add_up_to_the_moments_of_the_whole(seed: int, sizes: list[int], scale: float, offset: float) -> None:
    draw = np.random.default_rng(seed)
    parts = [scale * (draw.standard_t(3, n) + offset) for n in sizes]
    whole = np.concatenate(parts)
    first, *others = (CentralMoments.of(torch.from_numpy(part)) for part in parts)
    total = sum(others, first)
    assert total.n == whole.size
    np.testing.assert_allclose(total.mean.item(), whole.mean(), rtol=1e-12)
    if whole.size > 2:
        np.testing.assert_allclose(total.m2.item(), whole.size * whole.var(), rtol=1e-6)
        np.testing.assert_allclose(total.excess_kurtosis().item(), stats.kurtosis(whole), rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_cancel() -> None:
    x = 1e6 + np.random.default_rng(0).standard_normal(1000)
    half = CentralMoments.of(torch.from_numpy(x[:500])) + CentralMoments.of(torch.from_numpy(x[500:]))
    assert half.excess_kurtosis().item() == pytest.approx(stats.kurtosis(x - 1e6), abs=1e-6)


def test_equal_numbers_have_no_kurtosis() -> None:
    assert CentralMoments.of(torch.full((7,), 2.0, dtype=torch.float64)).excess_kurtosis().isnan()


def test_packing_keeps_everything() -> None:
    moments = CentralMoments.of(torch.arange(9.0, dtype=torch.float64) ** 2)
    again = CentralMoments.unpacked(moments.packed())
    assert again.n == 9
    assert torch.equal(again.packed(), moments.packed())
