"""Statistics of activations by the C++ kernels, and by torch where there are none, against float64 NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree import compiled
from normfree.modeling.activation_kernels import count_nonzero, kernels_take
from normfree.probes.residual_stream import StreamStatistics

pytestmark = pytest.mark.skipif(not kernels_take(torch.zeros(1)), reason="no compiled kernels")
DTYPES = [torch.float32, torch.bfloat16]


def stream_sums(x):
    assert kernels_take(x)
    return StreamStatistics.of(x)


def assert_sums_are_right(x, rtol=1e-12):
    found, exact = stream_sums(x), x.double().numpy()
    n_sequence, n_token, d = exact.shape
    assert [found.n_sequences, found.n_tokens, found.moments.n] == [n_sequence, n_sequence * n_token, exact.size]
    assert [found.nan, found.inf] == [0, 0]
    units = exact / np.linalg.norm(exact, axis=-1, keepdims=True)
    deviations = exact - exact.mean()
    # the sums of odd powers may cancel: their error is that of their terms
    terms = [np.abs(deviations**power).sum() for power in (2, 3, 4)]
    np.testing.assert_allclose(found.channel_squares.numpy(), (exact**2).sum((0, 1)), rtol=rtol)
    magnitudes = np.sort(np.abs(exact), axis=-1)
    ratios = magnitudes[..., -1] / magnitudes[..., (d - 1) // 2]
    np.testing.assert_allclose(found.ratios.item(), ratios.sum(), rtol=rtol)
    if n_token > 1:
        gram = (units @ units.transpose(0, 2, 1))[:, ~np.eye(n_token, dtype=bool)]
        np.testing.assert_allclose(found.similarities.item(), gram.mean(-1).sum(), rtol=1e-9, atol=1e-9)
    else:
        assert found.similarities.isnan()
    np.testing.assert_allclose(found.moments.mean.item(), exact.mean(), rtol=0, atol=rtol * np.abs(exact).mean())
    moments = (found.moments.m2, found.moments.m3, found.moments.m4)
    for power, moment, size in zip((2, 3, 4), moments, terms, strict=True):
        np.testing.assert_allclose(moment.item(), (deviations**power).sum(), rtol=0, atol=10 * rtol * size)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.floats(-15, 18),
    offset=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_sums_of_a_stream_agree_with_float64_numpy(shape, dtype, exponent, offset, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset) * 10**exponent
    assert_sums_are_right(x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_every_library_that_this_cpu_runs_agrees_with_float64_numpy(library_for, instructions, dtype):
    library_for("activations", instructions)
    torch.manual_seed(0)
    x = torch.randn(3, 40, 100).to(dtype)
    assert_sums_are_right(x)
    assert_sums_are_right(x.transpose(0, 1))
    neurons = x.relu()
    assert count_nonzero(neurons) == int(np.count_nonzero(neurons.float().numpy()))


@settings(max_examples=150, deadline=None)
@given(
    d=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["many scales", "many equal", "close together", "all equal", "one large", "smallest numbers"]),
    seed=st.integers(0, 2**31),
)
def test_the_median_of_magnitudes_however_they_lie(d, dtype, kind, seed):
    """One token's largest over its median: numbers that differ in their exponents, in their last bits or not at all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, d, generator=generator)
    if kind == "many scales":
        x *= 10.0 ** torch.randint(-30, 30, (d,), generator=generator)
    elif kind == "many equal":
        x = x.round() + 0.5
    elif kind == "close together":
        x = 1 + torch.randint(0, 50, (1, 1, d), generator=generator) * 2.0**-23
    elif kind == "all equal":
        x = torch.full_like(x, -3.7)
    elif kind == "one large":
        x[..., 0] = 1e9
    elif kind == "smallest numbers":
        x = torch.randint(1, 90_000, (1, 1, d), generator=generator) * 1e-45
    x = x.to(dtype)
    magnitudes = np.sort(np.abs(x.double().numpy().ravel()))
    with np.errstate(all="ignore"):
        expected = magnitudes[-1] / magnitudes[(d - 1) // 2]
    np.testing.assert_equal(stream_sums(x).ratios.item(), expected)


def test_more_channels_than_small_counters_hold():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 70_001)
    magnitudes = x.abs().sort(dim=-1).values.double()
    assert stream_sums(x).ratios.item() == pytest.approx((magnitudes[..., -1] / magnitudes[..., 35_000]).sum().item())


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(0, 40_000),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from([None, None, math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 2**31),
)
def test_numbers_that_are_not_zero_are_counted(size, share, dtype, bad, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator).to(dtype)
    x[torch.rand(size, generator=generator) < share] = -0.0
    expected: int | None = int(np.count_nonzero(x.float().numpy()))
    if bad is not None and size:
        x[int(torch.randint(size, (), generator=generator))] = bad
        expected = None
    assert count_nonzero(x) == expected


def test_the_smallest_number_is_not_zero():
    assert count_nonzero(torch.tensor([0.0, -0.0, 1e-45, -1e-45])) == 2


def test_nan_and_infinite_entries_are_counted_apart():
    x = torch.randn(2, 5, 20)
    x[0, 1, 3] = x[1, 4, 19] = math.nan
    x[1, 0, 0] = -math.inf
    found = stream_sums(x)
    assert [found.nan, found.inf] == [2, 1]
    assert found.moments.packed()[1:].isnan().all()
    assert found.channel_squares.isfinite().tolist() == [channel not in (0, 3, 19) for channel in range(20)]


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    x = torch.randn(5, 30, 70)
    one = stream_sums(x)
    torch.set_num_threads(2)
    try:
        two = stream_sums(x)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.packed, two.packed)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_torch_says_the_same_where_there_are_no_kernels(without_libraries, monkeypatch, dtype, bad):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 30).to(dtype)
    if bad is not None:
        x[1, 2, 3] = bad
    assert not kernels_take(x)
    without = StreamStatistics.of(x)
    monkeypatch.undo()
    compiled.forget()
    with_them = StreamStatistics.of(x)
    torch.testing.assert_close(without.packed, with_them.packed, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert kernels_take(x) == (dtype in DTYPES)
