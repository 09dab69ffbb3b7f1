# ruff: noqa: N803 (the paper's names of matrices)
"""The Spark FFN of a few queries: every backend against the masked dense computation in float64 NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.errors import InputError
from normfree.spark.decode import pack_feed_forward, sparse_feed_forward

from . import numpy_spark
from .available import BACKENDS, DEVICES, INTERPRETER, QUICK_BACKENDS, dtypes_of

# the interpreter computes with NumPy, which warns where the kernels make NaN on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2.5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative to ``score_scale``: sums in float32 of unrounded intermediates, and one rounding of the output."""


def weights(generator, d, r, n_inner, d_out, dtype):
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return pack_feed_forward(normal(r, n_inner), normal(d - r, n_inner), normal(n_inner, d_out))


def score_scale(q, K1, K2, V, counts, predictor_bias=None, rest_bias=None):
    """The size of an output whose scores do not cancel against the threshold, as an active neuron's may."""

    def largest(bias):
        return 0 if bias is None else np.abs(numpy_spark.array(bias)).max()

    r, (q, K1, K2, V) = K1.shape[0], (np.abs(numpy_spark.array(each)) for each in (q, K1, K2, V))
    score = (q[:, :r] @ K1).max() + largest(predictor_bias)
    multiplier = np.linalg.norm(q[:, r:], axis=1).max() * np.linalg.norm(K2, axis=0).max() + largest(rest_bias)
    return 1 + score * multiplier * V.max() * math.sqrt(counts.max())


def assert_is_the_dense_result(backend, q, packed, k, **biases):
    expected, counts = numpy_spark.feed_forward(q, *packed, k, **biases)
    device = DEVICES[backend]
    moved_q, K1, K2, V = (each.to(device) for each in (q, *packed))
    moved_biases = {name: None if bias is None else bias.to(device) for name, bias in biases.items()}
    out = sparse_feed_forward(moved_q, K1, K2, V, k, F.gelu, backend=backend, **moved_biases)
    assert out.dtype == q.dtype
    # torch rounds the intermediates of half precision too
    tolerance = TOLERANCES[q.dtype] * (4 if backend == "torch" else 1) * score_scale(q, *packed, counts, **biases)
    np.testing.assert_allclose(numpy_spark.array(out), expected, rtol=0, atol=tolerance)
    return counts


def check_case(backend, data):
    n, d = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 150))
    r, n_inner = data.draw(st.integers(1, d - 1)), data.draw(st.integers(1, 300))
    k, dtype = data.draw(st.integers(1, n_inner)), data.draw(st.sampled_from(dtypes_of(backend)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    packed = weights(generator, d, r, n_inner, data.draw(st.integers(1, 100)), dtype)
    q = torch.randn(n, d, generator=generator).to(dtype)
    biases = {
        name: torch.randn(n_inner, generator=generator).to(dtype) if data.draw(st.booleans()) else None
        for name in ("predictor_bias", "rest_bias")
    }
    assert_is_the_dense_result(backend, q, packed, k, **biases)


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_the_masked_dense_computation(backend, data):
    check_case(backend, data)


@INTERPRETER
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_triton_agrees_with_the_masked_dense_computation(data):
    check_case("triton", data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_8_percent_of_neurons_about_as_many_are_active(backend):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 96, generator=generator)
    counts = assert_is_the_dense_result(backend, q, weights(generator, 96, 48, 1024, 96, torch.float32), 82)
    assert ((counts > 60) & (counts < 105)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_neuron_and_every_neuron(backend):
    """One query of zeros, whose scores are all 0, beside one that has active neurons; k = d_ff has no threshold."""
    generator = torch.Generator().manual_seed(0)
    packed = weights(generator, 20, 7, 130, 12, torch.float32)
    q = torch.randn(2, 20, generator=generator)
    q[0] = 0.0
    counts = assert_is_the_dense_result(backend, q, packed, 5)
    assert counts[0] == 0
    assert counts[1] > 0
    assert_is_the_dense_result(backend, q[:1], packed, 5)
    assert assert_is_the_dense_result(backend, q, packed, 130).tolist() == [130, 130]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_query_makes_nan_of_its_own_row_only(backend, bad):
    generator = torch.Generator().manual_seed(0)
    packed = weights(generator, 20, 7, 130, 12, torch.float32)
    q = torch.randn(3, 20, generator=generator)
    clean, _ = numpy_spark.feed_forward(q, *packed, 9)
    q[1, 2] = bad
    q, K1, K2, V = (each.to(DEVICES[backend]) for each in (q, *packed))
    out = sparse_feed_forward(q, K1, K2, V, 9, F.gelu, backend=backend).cpu()
    assert out[1].isnan().all()
    np.testing.assert_allclose(out[[0, 2]].numpy(), clean[[0, 2]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_inactive_neurons_are_not_read(backend):
    generator = torch.Generator().manual_seed(0)
    packed = weights(generator, 20, 7, 130, 12, torch.float32)
    q = torch.randn(1, 20, generator=generator)
    scores = q[:, :7] @ packed.K1
    expected, _ = numpy_spark.feed_forward(q, *packed, 9)
    inactive = scores[0] < scores.median()
    packed.K2[:, inactive] = math.nan
    packed.V[inactive] = math.nan
    q, K1, K2, V = (each.to(DEVICES[backend]) for each in (q, *packed))
    out = sparse_feed_forward(q, K1, K2, V, 9, F.gelu, backend=backend).cpu()
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-4)


def test_packed_weights_are_the_same_numbers_and_copied_only_where_needed():
    linears = torch.randn(30, 4), torch.randn(30, 6), torch.randn(10, 30)
    packed = pack_feed_forward(*(each.t() for each in linears))
    for mine, linear in zip(packed, linears, strict=True):
        assert torch.equal(mine, linear.t())
    assert packed.K2.data_ptr() == linears[1].data_ptr()
    assert pack_feed_forward(*packed).V.data_ptr() == packed.V.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; as a count it must be 1 to 30"),
        ({"k": 31}, "k is 31; as a count it must be 1 to 30"),
        ({"k": 1.5}, r"must be in \(0, 1\]"),
        ({"q": torch.randn(2, 4)}, "r is 4; the predictor must read between 1 and 3 of the 4 dimensions"),
        ({"q": torch.randn(10)}, "q, K1, K2 and V must be"),
        ({"V": torch.randn(29, 10)}, r"V \[30, d\]"),
        ({"q": torch.randn(2, 10, dtype=torch.float64)}, "one float dtype, got torch.float32, torch.float64"),
        ({"V": torch.randn(10, 30).t()}, "pack them once with pack_feed_forward"),
        ({"K1": torch.randn(30, 4).t()}, "pack them once with pack_feed_forward"),
        ({"predictor_bias": torch.randn(3)}, r"predictor_bias must be \[30\], got \[3\]"),
        ({"backend": "cuda"}, "unknown sparse decode backend 'cuda'"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 10),
        "K1": torch.randn(4, 30),
        "K2": torch.randn(30, 6).t(),
        "V": torch.randn(30, 10),
        "k": 3,
        "activation": F.gelu,
    } | change
    with pytest.raises(InputError, match=message) as raised:
        sparse_feed_forward(**arguments)
    assert "\n" not in str(raised.value)
