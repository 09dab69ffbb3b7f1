# ruff: noqa: N803 (the paper's names of matrices)
"""The Spark FFN of a few queries: every backend against the masked dense computation in float64 NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from normfree.errors import InputError
from normfree.spark.decode import pack_feed_forward, sparse_feed_forward

from . import numpy_spark
from .available import BACKENDS, DEVICES, check_cases, dtypes_of, unless_available

# the interpreter computes with NumPy, which warns where the kernels make NaN on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2.5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative to ``score_scale``: sums in float32 of unrounded intermediates, and one rounding of the output."""


def weights(generator, d, r, n_inner, d_out, dtype=torch.float32):
    """K1, K2 and V, contiguous."""
    shapes = (r, n_inner), (d - r, n_inner), (n_inner, d_out)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def decoded(backend, q, matrices, k, activation=F.gelu, **biases):
    """``sparse_feed_forward`` on the backend's device, with the matrices in its layout."""
    device = DEVICES[backend]
    packed = pack_feed_forward(*(each.to(device) for each in matrices), backend=backend)
    moved: dict[str, Any] = {name: None if bias is None else bias.to(device) for name, bias in biases.items()}
    return sparse_feed_forward(q.to(device), *packed, k, activation, backend=backend, **moved).cpu()


def score_scale(q, K1, K2, V, *, counts, predictor_bias=None, rest_bias=None):
    """The size of an output whose scores do not cancel against the threshold, as an active neuron's may."""

    def largest(bias):
        return 0 if bias is None else np.abs(numpy_spark.array(bias)).max()

    r, (q, K1, K2, V) = K1.shape[0], (np.abs(numpy_spark.array(each)) for each in (q, K1, K2, V))
    score = (q[:, :r] @ K1).max() + largest(predictor_bias)
    multiplier = np.linalg.norm(q[:, r:], axis=1).max() * np.linalg.norm(K2, axis=0).max() + largest(rest_bias)
    # where no neuron is active, one may be that is at the threshold but for rounding
    return 1 + score * multiplier * V.max() * math.sqrt(max(counts.max(), 1))


def assert_is_the_dense_result(backend, q, matrices, k, **biases):
    expected, counts = numpy_spark.feed_forward(q, *matrices, k=k, **biases)
    out = decoded(backend, q, matrices, k, **biases)
    assert out.dtype == q.dtype
    # torch rounds the intermediates of half precision too
    tolerance = TOLERANCES[q.dtype] * (4 if backend == "torch" else 1)
    tolerance *= score_scale(q, *matrices, counts=counts, **biases)
    np.testing.assert_allclose(numpy_spark.array(out), expected, rtol=0, atol=tolerance)
    return counts


def check_case(backend, data):
    n, d = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 150))
    r, n_inner = data.draw(st.integers(1, d - 1)), data.draw(st.integers(1, 300))
    k, dtype = data.draw(st.integers(1, n_inner)), data.draw(st.sampled_from(dtypes_of(backend)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    matrices = weights(generator, d, r, n_inner, data.draw(st.integers(1, 100)), dtype)
    q = torch.randn(n, d, generator=generator).to(dtype)
    biases = {
        name: torch.randn(n_inner, generator=generator).to(dtype) if data.draw(st.booleans()) else None
        for name in ("predictor_bias", "rest_bias")
    }
    assert_is_the_dense_result(backend, q, matrices, k, **biases)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_masked_dense_computation(backend):
    check_cases(check_case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_8_percent_of_neurons_about_as_many_are_active(backend):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 96, generator=generator)
    counts = assert_is_the_dense_result(backend, q, weights(generator, 96, 48, 1024, 96), 82)
    assert ((counts > 60) & (counts < 105)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_neuron_and_every_neuron(backend):
    """One query of zeros, whose scores are all 0, beside one that has active neurons; k = d_ff has no threshold."""
    generator = torch.Generator().manual_seed(0)
    matrices = weights(generator, 20, 7, 130, 12)
    q = torch.randn(2, 20, generator=generator)
    q[0] = 0.0
    counts = assert_is_the_dense_result(backend, q, matrices, 5)
    assert counts[0] == 0
    assert counts[1] > 0
    assert_is_the_dense_result(backend, q[:1], matrices, 5)
    assert assert_is_the_dense_result(backend, q, matrices, 130).tolist() == [130, 130]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_query_makes_nan_of_its_own_row_only(backend, bad):
    generator = torch.Generator().manual_seed(0)
    matrices = weights(generator, 20, 7, 130, 12)
    q = torch.randn(3, 20, generator=generator)
    clean, _ = numpy_spark.feed_forward(q, *matrices, k=9)
    q[1, 2] = bad
    out = decoded(backend, q, matrices, 9)
    assert out[1].isnan().all()
    np.testing.assert_allclose(out[[0, 2]].numpy(), clean[[0, 2]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_inactive_neurons_are_not_read(backend):
    generator = torch.Generator().manual_seed(0)
    matrices = weights(generator, 20, 7, 130, 12)
    q = torch.randn(1, 20, generator=generator)
    K1, K2, V = matrices
    scores = q[:, :7] @ K1
    expected, _ = numpy_spark.feed_forward(q, *matrices, k=9)
    inactive = scores[0] < scores.median()
    K2[:, inactive] = math.nan
    V[inactive] = math.nan
    out = decoded(backend, q, matrices, 9)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("activation", "exact"),
    [
        (nn.GELU(), numpy_spark.gelu),
        (nn.GELU(approximate="tanh"), lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        (nn.ReLU(), lambda x: np.maximum(x, 0)),
        (torch.relu, lambda x: np.maximum(x, 0)),
        (F.silu, lambda x: x / (1 + np.exp(-x))),
        (nn.SiLU(), lambda x: x / (1 + np.exp(-x))),
        (lambda x: x.relu().square(), lambda x: np.maximum(x, 0) ** 2),
        (nn.LeakyReLU(0.1), lambda x: np.where(x > 0, x, 0.1 * x)),
    ],
    ids=lambda each: getattr(each, "__name__", None) or repr(each),
)
def test_each_activation_of_positive_and_negative_numbers(backend, activation, exact):
    """Without a threshold an activation sees negative numbers too."""
    generator = torch.Generator().manual_seed(0)
    matrices = weights(generator, 20, 7, 130, 12)
    q = torch.randn(2, 20, generator=generator)
    for k in (9, 130):
        expected, _ = numpy_spark.feed_forward(q, *matrices, k=k, activation=exact)
        scale = np.abs(expected).max()
        out = decoded(backend, q, matrices, k, activation)
        np.testing.assert_allclose(out.numpy() / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_weights_are_the_same_numbers_and_copied_only_where_needed(backend):
    linears = torch.randn(30, 4), torch.randn(30, 6), torch.randn(10, 30)
    packed = pack_feed_forward(*(each.t().to(DEVICES[backend]) for each in linears), backend=backend)
    for mine, linear in zip(packed, linears, strict=True):
        assert torch.equal(mine.cpu(), linear.t())
    again = pack_feed_forward(*packed, backend=backend)
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in packed]
    if backend == "cpu":
        assert [each.data_ptr() for each in packed[:2]] == [each.data_ptr() for each in linears[:2]]


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
        pytest.param(
            {"K1": torch.randn(4, 30), "backend": "cpu"},
            "pack them once with pack_feed_forward",
            marks=unless_available("cpu"),
        ),
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
        "backend": "torch",
    } | change
    with pytest.raises(InputError, match=message) as raised:
        sparse_feed_forward(**arguments)
    assert "\n" not in str(raised.value)
