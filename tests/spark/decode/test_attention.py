"""Spark attention of one query: every backend against the masked dense computation in float64 NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from normfree.errors import InputError
from normfree.spark.decode import sparse_attention_decode

from . import numpy_spark
from .available import BACKENDS, DEVICES, check_cases, dtypes_of

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# the interpreter computes with NumPy, which warns where the kernels make NaN on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(seed, batch, n_kv_head, group, n_key, r, rest, value_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, n_kv_head * group, r + rest),
        (batch, n_kv_head, n_key, r),
        (batch, n_kv_head, n_key, rest),
        (batch, n_kv_head, n_key, value_dim),
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(backend, tensors, k, visible=None, **scales):
    device = DEVICES[backend]
    visible = None if visible is None else visible.to(device)
    q, predictor_keys, rest_keys, values = (each.to(device) for each in tensors)
    return sparse_attention_decode(q, predictor_keys, rest_keys, values, k, visible=visible, backend=backend, **scales)


def check_case(backend, data):
    batch, n_kv_head, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    most = 100 if backend == "triton" else 600
    n_key, r, rest = data.draw(st.integers(1, most)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    value_dim, seed = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 2**31))
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    k = data.draw(st.one_of(st.integers(1, 2 * n_key), st.floats(0.01, 1.0)))
    tensors = inputs(seed, batch, n_kv_head, group, n_key, r, rest, value_dim, dtype)
    visible = None
    if data.draw(st.booleans()):
        visible = torch.rand(batch, n_key, generator=torch.Generator().manual_seed(seed)) < 0.7
        visible[:, -1] = True
    scales: dict[str, Any] = {"predictor_scale": r**-0.5, "rest_scale": rest**-0.5}
    expected, _, margin = numpy_spark.attention(*tensors, k=k, visible=visible, **scales)
    # a score nearer to the threshold than rounding falls on either side of it, and takes its whole weight along
    assume(margin > (1e-12 if dtype == torch.float64 else 2e-5))
    if dtype in (torch.bfloat16, torch.float16) and backend == "torch":
        assume(margin > 0.1 or margin == math.inf)
    out = attend(backend, tensors, k, visible, **scales)
    assert out.dtype == dtype
    tolerance = TOLERANCES[dtype] * (4 if backend == "torch" else 1) * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(numpy_spark.array(out), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_masked_dense_computation(backend):
    check_cases(check_case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_is_not_a_share_of_one(backend):
    tensors = inputs(0, 1, 1, 1, 5, 4, 4, 4)
    for k, count in ((1, 1), (1.0, 5), (1, 1)):
        expected, counts, _ = numpy_spark.attention(*tensors, k=k, predictor_scale=0.5, rest_scale=0.5)
        assert (counts == count).all()
        out = attend(backend, tensors, k, predictor_scale=0.5, rest_scale=0.5)
        np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_of_other_tokens_are_not_read(backend):
    tensors = inputs(0, 1, 1, 2, 300, 16, 16, 8)
    expected, counts, _ = numpy_spark.attention(*tensors, k=30, predictor_scale=0.25, rest_scale=0.25)
    assert ((counts > 10) & (counts < 60)).all()
    q, predictor_keys, rest_keys, values = tensors
    scores = q[:, :, :16] @ predictor_keys[:, 0].transpose(1, 2)
    unread = (scores < scores.median(-1, keepdim=True).values).all(1)[0]
    rest_keys[:, :, unread] = math.nan
    values[:, :, unread] = math.nan
    out = attend(backend, tensors, 30, predictor_scale=0.25, rest_scale=0.25)
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_longer_cache(backend):
    tensors = inputs(0, 2, 2, 2, 90, 8, 8, 8)
    scales: dict[str, Any] = {"predictor_scale": 0.3, "rest_scale": 0.3}
    short = [tensors[0], *(each[:, :, :50] for each in tensors[1:])]
    expected, _, _ = numpy_spark.attention(*short, k=10, **scales)
    np.testing.assert_allclose(attend(backend, short, 10, **scales).cpu().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nonfinite_key_or_a_sequence_that_sees_nothing_is_nan_and_spoils_no_other(backend):
    tensors = inputs(0, 3, 1, 2, 40, 8, 8, 8)
    clean, _, _ = numpy_spark.attention(*tensors, k=10, predictor_scale=0.3, rest_scale=0.3)
    tensors[1][0, 0, 3, 0] = math.nan
    visible = torch.ones(3, 40, dtype=torch.bool)
    visible[1] = False
    out = attend(backend, tensors, 10, visible, predictor_scale=0.3, rest_scale=0.3).cpu()
    assert out[:2].isnan().all()
    np.testing.assert_allclose(out[2].numpy(), clean[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; as a count it must be at least 1"),
        ({"q": torch.randn(1, 4, 6)}, "r is 6 and the rest 6"),
        ({"q": torch.randn(1, 3, 12)}, r"n_head \(3\) is not divisible by n_kv_head \(2\)"),
        ({"values": torch.randn(1, 2, 19, 5)}, "do not have one batch"),
        ({"values": torch.randn(1, 2, 20, 5, dtype=torch.bfloat16)}, "one float dtype"),
        ({"q": torch.randn(4, 12)}, r"q must be \[batch, n_head, head_dim\]"),
        ({"visible": torch.ones(1, 20)}, r"visible must be bool \[1, 20\]"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    names = ("q", "predictor_keys", "rest_keys", "values")
    arguments = dict(zip(names, inputs(0, 1, 2, 2, 20, 6, 6, 5), strict=True)) | {"k": 4} | change
    with pytest.raises(InputError, match=message) as raised:
        sparse_attention_decode(**arguments)
    assert "\n" not in str(raised.value)
