import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.entropy import count_nonfinite_scores
from normfree.entropy.nonfinite_scores import _certified_finite

from .numpy_entropy import visible


def direct_count(q, k, scale, allowed):
    """The whole matrix at once, in q's dtype, as eager attention computes it."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (torch.matmul(q, k.transpose(-1, -2)) * scale).float().numpy()
    allowed = np.broadcast_to(allowed, scores.shape)
    return ((kind(scores) & allowed).sum((0, 2, 3)).tolist() for kind in (np.isnan, np.isinf))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    size=st.floats(0, 3),
    is_causal=st.booleans(),
    masked=st.booleans(),
    bad=st.sampled_from([None, math.nan, math.inf]),
)
def test_counts_what_the_dtype_gives(seed, dtype, size, is_causal, masked, bad):
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(2, 4, 9, 8, generator=generator) * 10**size).to(dtype)
    k = (torch.randn(2, 2, 12, 8, generator=generator) * 10**size).to(dtype)
    q[:, 0] = 0.01  # a head that is certified beside heads that are not
    if bad is not None:
        k[0, 1, 4, 2] = bad
    mask = torch.rand(2, 1, 9, 12, generator=generator) < 0.5 if masked else None
    allowed = visible(9, 12, is_causal, None)[None, None] & (True if mask is None else mask.numpy())
    nan, inf = count_nonfinite_scores(q, k, scale=0.3, is_causal=is_causal, attention_mask=mask)
    expected_nan, expected_inf = direct_count(q, k, 0.3, allowed)
    assert nan.dtype == inf.dtype == torch.int64
    assert nan.tolist() == expected_nan
    assert inf.tolist() == expected_inf


def test_float16_overflows_before_the_scale_brings_it_back():
    q = k = torch.full((1, 1, 2, 16), 100.0, dtype=torch.float16)
    count = count_nonfinite_scores(q, k, scale=1e-3)
    assert count.inf.tolist() == [3]
    assert count.nan.tolist() == [0]
    assert count_nonfinite_scores(q.float(), k.float(), scale=1e-3).inf.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0, 3), scale=st.floats(0.01, 20))
def test_the_certificate_is_never_wrong(seed, size, scale):
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(1, 3, 8, 16, generator=generator) * 10**size).half()
    k = (torch.randn(1, 3, 8, 16, generator=generator) * 10**size).half()
    finite = (q @ k.transpose(-1, -2) * scale).isfinite().all(-1).all(-1)[0]
    assert (finite | ~_certified_finite(q, k, scale)).all()


def test_ordinary_heads_are_certified():
    q = k = torch.randn(1, 2, 64, 64, dtype=torch.float16)
    assert _certified_finite(q, k, 0.125).all()
    q = q.clone()
    q[0, 1, 3, 3] = math.nan
    assert _certified_finite(q, k, 0.125).tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_kept_apart(bad):
    q, k = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    k[0, 0, 1, 0] = bad
    nan, inf = count_nonfinite_scores(q, k)
    assert (nan.item(), inf.item()) == ((2, 0) if math.isnan(bad) else (0, 2))
