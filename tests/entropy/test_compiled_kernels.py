"""The C++ kernels of attention entropy, where their blocks end, and each of their builds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.entropy import attention_entropy, compiled_kernels, select_backend
from normfree.entropy.compiled_kernels import entropy_and_lse, kernels_refuse, weights_entropy
from normfree.entropy.reference import ReadWeights, read_weights
from normfree.entropy.scoring import Scoring
from normfree.entropy.visibility import visibility_of
from normfree.errors import InputError

from .numpy_entropy import entropy_of, scores_of, tolerance, visible

pytestmark = pytest.mark.skipif(kernels_refuse() is not None, reason="no compiled kernels")


def entropy_of_compiled(q, k, **options):
    return attention_entropy(q, k, backend="compiled", **options).numpy()


@settings(max_examples=60, deadline=None)
@given(
    n_query=st.integers(1, 200),
    n_cached=st.sampled_from([0, 0, 1, 250, 300]),
    window=st.sampled_from([None, None, 7, 100, 300]),
    is_causal=st.booleans(),
    mask=st.sampled_from(["none", "padding", "per head"]),
    magnitude=st.floats(0, 4),
    rises=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_of_many_blocks_agree_with_float64_numpy(
    n_query, n_cached, window, is_causal, mask, magnitude, rises, seed
):
    generator = torch.Generator().manual_seed(seed)
    n_key = n_query + n_cached
    size = 10 ** (magnitude / 2)
    q = torch.randn(2, 4, n_query, 16, generator=generator) * size
    k = torch.randn(2, 2, n_key, 16, generator=generator) * size
    if rises:  # the largest score so far changes in every block
        k = k * torch.linspace(0.1, 1, n_key)[:, None]
    allowed = visible(n_query, n_key, is_causal, window)[None, None]
    given = None
    if mask != "none":
        shape = (2, 1, 1, n_key) if mask == "padding" else (1, 4, n_query, n_key)
        given = torch.rand(shape, generator=generator) < 0.3
        allowed = allowed & given.numpy()
    expected = entropy_of(scores_of(q, k, 0.25), allowed)
    actual = entropy_of_compiled(q, k, is_causal=is_causal, sliding_window=window, attention_mask=given)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(q, k, 0.25))
    assert not (actual < 0).any()


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_every_library_that_this_cpu_runs_agrees_with_float64_numpy(library_for, instructions):
    library_for("attention_entropy", instructions)
    torch.manual_seed(0)
    q, k = 3 * torch.randn(2, 4, 150, 48), torch.randn(2, 2, 420, 48)
    keep = torch.rand(2, 1, 150, 420) < 0.7
    expected = entropy_of(scores_of(q, k, 0.2), visible(150, 420, True, None) & keep.numpy())
    actual = entropy_of_compiled(q, k, scale=0.2, attention_mask=keep)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(q, k, 0.2))
    weights = torch.randn(2, 3, 40, 77).softmax(-1)
    visibility = visibility_of(q[:, :3, :40], k[:, :1, :77], is_causal=False, attention_mask=None, sliding_window=None)
    read = weights_entropy(weights, visibility, max_total_error=2e-6)
    assert read.all_positive
    assert read.are_distributions
    assert torch.equal(read.first, weights[..., 0])
    np.testing.assert_allclose(read.entropy.numpy(), entropy_of(weights.double().log().numpy(), True), atol=2e-6)


def test_two_keys_have_the_closed_form():
    """H = ln(1 + e^-x) + x e^-x / (1 + e^-x) for scores x apart, from alike to beyond what float32 resolves."""
    x = torch.cat([torch.logspace(-6, 3, 1000), torch.linspace(80, 110, 400)])[None, None, :, None]
    entropy = entropy_of_compiled(x, torch.tensor([1.0, 0.0])[None, None, :, None], scale=1.0, is_causal=False)
    distance = x[..., 0].double().numpy()
    weight = np.exp(-distance)
    expected = np.log1p(weight) + distance * weight / (1 + weight)
    np.testing.assert_allclose(entropy, expected, rtol=2e-6, atol=1e-7)


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 300, 32), torch.randn(2, 2, 300, 32)
    one = entropy_of_compiled(q, k)
    torch.set_num_threads(2)
    try:
        two = entropy_of_compiled(q, k)
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(one, two)


def test_the_logsumexp_is_that_of_the_scores():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 70, 8), torch.randn(1, 2, 300, 8)
    keep = torch.rand(1, 1, 70, 300) < 0.5
    keep[:, :, 3] = False
    visibility = visibility_of(q, k, is_causal=True, attention_mask=keep, sliding_window=None)
    _, lse = entropy_and_lse(q, k, Scoring(0.3), visibility)
    hidden = ~torch.from_numpy(visible(70, 300, True, None)) | ~keep
    expected = (q.double() @ k.double().transpose(-1, -2) * 0.3).masked_fill(hidden, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_key_in_a_late_block_spoils_the_queries_that_see_it_alone(bad):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 400, 8).abs(), torch.randn(1, 2, 400, 8)
    k[0, 1, 333, 3] = bad
    spoilt = np.isnan(entropy_of_compiled(q, k))
    assert spoilt[0, 1, 333:].all()
    assert spoilt.sum() == 400 - 333


@settings(max_examples=100, deadline=None)
@given(
    n_query=st.integers(1, 70),
    n_cached=st.sampled_from([0, 5, 61]),
    size=st.floats(0, 200),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_entropy_of_weights_agrees_with_float64_numpy(n_query, n_cached, size, is_causal, seed):
    n_key = n_query + n_cached
    q, k = torch.empty(2, 3, n_query, 4), torch.empty(2, 3, n_key, 4)
    visibility = visibility_of(q, k, is_causal=is_causal, attention_mask=None, sliding_window=None)
    scores = size * torch.randn(2, 3, n_query, n_key, generator=torch.Generator().manual_seed(seed))
    allowed = visible(n_query, n_key, is_causal, None)
    weights = scores.masked_fill(~torch.from_numpy(allowed), -math.inf).softmax(-1)
    exact = weights.double().numpy()
    expected = -np.where(exact > 0, exact * np.log(np.where(exact > 0, exact, 1)), 0).sum(-1)
    read = weights_entropy(weights, visibility, max_total_error=1e-6)
    np.testing.assert_allclose(read.entropy.numpy(), expected, rtol=0, atol=3e-6)
    assert read.all_positive == bool((exact[np.broadcast_to(allowed, exact.shape)] > 0).all())
    assert read.are_distributions


@settings(max_examples=200, deadline=None)
@given(
    n_key=st.integers(1, 70),
    place=st.tuples(st.integers(0, 5), st.floats(0, 1)),
    value=st.sampled_from([0.0, -0.0, -1e-3, 1e-45, 0.5, math.nan, math.inf]),
    is_causal=st.booleans(),
)
def test_one_bad_weight_anywhere_is_found(n_key, place, value, is_causal):
    """That of a hidden key alone is not looked at."""
    n_query = min(6, n_key)
    row, key = min(place[0], n_query - 1), round(place[1] * (n_key - 1))
    q, k = torch.empty(1, 1, n_query, 4), torch.empty(1, 1, n_key, 4)
    visibility = visibility_of(q, k, is_causal=is_causal, attention_mask=None, sliding_window=None)
    allowed = visible(n_query, n_key, is_causal, None)
    weights = torch.zeros(1, 1, n_query, n_key).masked_fill(~torch.from_numpy(allowed), -math.inf).softmax(-1)
    weights[0, 0, row, key] = value
    shown = np.where(allowed, weights[0, 0].double().numpy(), np.nan)
    read = weights_entropy(weights, visibility, max_total_error=1e-3)
    assert read.all_positive == bool((shown[allowed] > 0).all())
    totals = np.where(allowed, weights[0, 0].double().numpy(), 0).sum(-1)
    assert read.are_distributions == (not (np.abs(totals - 1) > 1e-3).any())


def test_the_largest_error_of_a_sum_is_as_asked_for():
    q = torch.empty(1, 1, 3, 4)
    visibility = visibility_of(q, q, is_causal=False, attention_mask=None, sliding_window=None)
    weights = torch.full((1, 1, 3, 3), 1 / 3)
    weights[0, 0, 1, 2] += 0.01
    assert weights_entropy(weights, visibility, max_total_error=0.011).are_distributions
    assert not weights_entropy(weights, visibility, max_total_error=0.009).are_distributions


def read(weights, visibility) -> ReadWeights:
    found = read_weights(weights, visibility)
    assert found is not None
    return found


def test_weights_that_are_nan_have_nan_and_those_after_dropout_none():
    weights = torch.full((1, 1, 2, 40), 1 / 40)
    visibility = visibility_of(
        weights[..., :4], weights[:, :, :1, :4].expand(1, 1, 40, 4), is_causal=False, attention_mask=None,
        sliding_window=None,
    )  # fmt: skip
    assert read(weights, visibility).all_scores_finite
    weights[0, 0, 1, 39] = math.nan
    with_nan = read(weights, visibility)
    torch.testing.assert_close(with_nan.entropy[0, 0], torch.tensor([math.log(40), math.nan]), equal_nan=True)
    assert not with_nan.all_scores_finite
    assert read_weights(weights.nan_to_num(0) * 1.1, visibility) is None


def test_a_weight_of_0_may_be_that_of_an_infinite_score():
    q = torch.empty(1, 1, 4, 2)
    visibility = visibility_of(q, q, is_causal=True, attention_mask=None, sliding_window=None)
    weights = (torch.zeros(1, 1, 4, 4) + torch.full((4, 4), -math.inf).triu(1)).softmax(-1)
    assert read(weights, visibility).all_scores_finite
    weights[0, 0, 3] = torch.tensor([0.5, 0.0, 0.25, 0.25])
    assert not read(weights, visibility).all_scores_finite


def test_without_the_library_auto_takes_the_flash_kernel_and_a_name_is_refused(without_libraries):
    q = torch.randn(1, 2, 8, 4)
    assert select_backend(q, q) == "cpu"
    assert not compiled_kernels.are_fast()
    assert attention_entropy(q, q).isfinite().all()
    with pytest.raises(InputError, match="backend 'compiled' cannot be used: its kernels were not compiled"):
        attention_entropy(q, q, backend="compiled")


def test_float64_is_refused():
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(InputError, match="it computes in float32, got float64"):
        attention_entropy(q, q, backend="compiled")


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("softcap", [None, 0.3, 5.0, 50.0])
@pytest.mark.parametrize("bias_shape", [None, (4, 1, 420), (2, 1, 150, 1), (1, 4, 150, 420), (2, 4, 1, 420)])
def test_soft_caps_and_biases_of_every_library(library_for, instructions, softcap, bias_shape):
    library_for("attention_entropy", instructions)
    torch.manual_seed(0)
    q, k = 5 * torch.randn(2, 4, 150, 48), torch.randn(2, 2, 420, 48)
    bias = None if bias_shape is None else 4 * torch.randn(bias_shape)
    keep = torch.rand(2, 1, 150, 420) < 0.7
    scores = scores_of(q, k, 0.2, softcap) + (0 if bias is None else bias.double().numpy())
    expected = entropy_of(scores, visible(150, 420, True, None) & keep.numpy())
    options: dict[str, Any] = {"scale": 0.2, "attention_mask": keep, "softcap": softcap, "bias": bias}
    most = tolerance(q, k, 0.2, 0.0 if bias is None else bias)
    np.testing.assert_allclose(entropy_of_compiled(q, k, **options), expected, rtol=0, atol=most)


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_the_soft_cap_s_tanh_is_exact_from_tiny_to_infinite(library_for, instructions):
    """Two keys, one of score 0, tell the other one's soft-capped score by the share of the first."""
    library_for("attention_entropy", instructions)
    x = torch.cat([torch.logspace(-6, 6, 3000), torch.linspace(0.5, 1.0, 999), torch.tensor([1e38])])
    x = torch.cat([x, -x])[None, None, :, None]
    k = torch.tensor([10.0, 0.0])[None, None, :, None]  # 10 · 1e38 is infinite
    visibility = visibility_of(x, k, is_causal=False, attention_mask=None, sliding_window=None)
    entropy, lse = entropy_and_lse(x, k, Scoring(0.1, 3.0), visibility)
    capped = 3 * np.tanh(x[0, 0, :, 0].double().numpy() / 3)
    np.testing.assert_allclose(lse[0, 0], np.logaddexp(0, capped), rtol=3e-7, atol=3e-7)
    p = 1 / (1 + np.exp(-capped))
    np.testing.assert_allclose(entropy[0, 0], -p * np.log(p) - (1 - p) * np.log1p(-p), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_bias_in_a_late_block_spoils_the_queries_that_see_it_alone(bad):
    torch.manual_seed(0)
    q, bias = torch.randn(1, 2, 400, 8), torch.randn(1, 2, 1, 400)
    bias[0, 1, 0, 333] = bad
    spoilt = np.isnan(entropy_of_compiled(q, q, bias=bias, softcap=4.0))
    # -inf hides the key
    assert spoilt.sum() == (0 if bad == -math.inf else 400 - 333)
    assert spoilt[0, 1, 333:].all() == (bad != -math.inf)
