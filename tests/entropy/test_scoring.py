"""Soft-caps, biases and learned sinks, on every backend that takes them, against float64 NumPy."""

import math
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.entropy import (
    attention_and_entropy,
    attention_entropy,
    attention_entropy_reference,
    compiled_kernels,
    count_nonfinite_scores,
    select_backend,
    uniform_entropy_bound,
)
from normfree.entropy import fused as fused_module
from normfree.entropy import visibility as visibility_module
from normfree.entropy.fused import attention_entropy_and_sink, scores_refuse
from normfree.entropy.scoring import Scoring
from normfree.entropy.visibility import visibility_of
from normfree.errors import InputError

from .numpy_entropy import EPS32, entropy_of, scores_of, visible, weights_of
from .test_fused import BACKENDS, attention_cases

BIASES = ["none", "alibi", "full", "hiding", "per query"]


@st.composite
def scoring_cases(draw, magnitudes=(-1.0, 3.0)):
    """q, k, options, the visible pairs, float64 scores of all pairs, sinks or None, and the size of what rounds."""
    q, k, options, allowed, mask_bias = draw(attention_cases(magnitudes=magnitudes))
    (batch, n_head, n_query, head_dim), n_key = q.shape, k.shape[2]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    softcap = draw(st.sampled_from([None, 1.0, 7.5, 50.0]))
    bias, kind = None, draw(st.sampled_from(BIASES))
    if kind == "alibi":
        bias = torch.tensor([2.0**-head for head in range(n_head)])[:, None, None] * torch.arange(n_key)
    elif kind in ("full", "hiding"):
        bias = 3 * torch.randn(batch, n_head, n_query, n_key, generator=generator)
        if kind == "hiding":
            keep = torch.rand(1, n_head, 1, n_key, generator=generator) < 0.8
            bias = bias.masked_fill(~keep, draw(st.sampled_from([-math.inf, torch.finfo(torch.float32).min])))
            allowed = allowed & keep.numpy()
    elif kind == "per query":
        bias = torch.randn(1, 1, n_query, 1, generator=generator).to(q.dtype)
    shape = draw(st.sampled_from([None, (n_head,), (1, n_head, 1), (batch, n_head, n_query)]))
    sinks = rows = None
    if shape is not None:
        sinks = draw(st.sampled_from([1.0, 30.0])) * torch.randn(shape, generator=generator)
        rows = sinks.double().numpy()
        rows = rows[None, :, None] if rows.ndim == 1 else rows
    added = np.asarray(mask_bias) + (0.0 if bias is None else np.where(allowed, bias.double().numpy(), 0.0))
    scale = head_dim**-0.5
    scores = scores_of(q, k, scale, softcap) + added
    q_length, k_length = (float(each.double().norm(dim=-1).max()) for each in (q, k))
    seen = np.abs(np.where(allowed, added, 0.0)).max()
    size = 1 + scale * q_length * k_length + seen + (0.0 if sinks is None else float(sinks.abs().max()))
    return q, k, options | {"softcap": softcap, "bias": bias, "sinks": sinks}, allowed, scores, rows, size


def backends_for(q, k, options):
    """All that take these scores; "auto" takes all."""
    visibility = visibility_of(q, k, **{name: options[name] for name in ("attention_mask", "bias")}, **KINDLESS)
    refused = scores_refuse(Scoring(1.0, options["softcap"]), visibility) is not None
    return ["auto", *(name for name in BACKENDS if not refused or name != "cpu")]


KINDLESS: dict[str, Any] = {"is_causal": False, "sliding_window": None}


@settings(max_examples=200, deadline=None)
@given(case=scoring_cases(), small_blocks=st.booleans(), small_parts=st.booleans())
def test_every_backend_agrees_with_float64_numpy(case, small_blocks, small_parts):
    q, k, options, allowed, scores, sinks, size = case
    expected = entropy_of(scores, allowed, sinks)
    for name in backends_for(q, k, options):
        with (
            patch.object(visibility_module, "BLOCK_ELEMENTS", 1 if small_blocks else visibility_module.BLOCK_ELEMENTS),
            patch.object(fused_module, "PART_ELEMENTS", 1 if small_parts else fused_module.PART_ELEMENTS),
        ):
            entropy = attention_entropy(q, k, backend=name, **options)
        assert entropy.dtype == torch.float32
        assert not (entropy < 0).any()
        np.testing.assert_allclose(entropy.numpy(), expected, rtol=0, atol=4 * EPS32 * size, err_msg=name)


@settings(max_examples=100, deadline=None)
@given(case=scoring_cases())
def test_float64_reference_is_exact(case):
    q, k, options, allowed, scores, sinks, size = case
    entropy = attention_entropy_reference(q, k, **options)
    assert entropy.dtype == torch.float64
    np.testing.assert_allclose(entropy.numpy(), entropy_of(scores, allowed, sinks), rtol=0, atol=1e-13 * size)


@settings(max_examples=100, deadline=None)
@given(case=scoring_cases(magnitudes=(-1.0, 1.0)))
def test_share_of_the_first_key_is_its_weight_next_to_the_sink(case):
    q, k, options, allowed, scores, sinks, size = case
    softcap, given_sinks = options.pop("softcap"), options.pop("sinks")
    visibility = visibility_of(q, k, **options)
    entropy, share = attention_entropy_and_sink(
        q, k, q.shape[-1] ** -0.5, visibility, "auto", softcap=softcap, sinks=given_sinks
    )
    first = visibility.first_key().expand(q.shape[:2]).numpy()
    weights = weights_of(scores, allowed, sinks)
    expected = np.take_along_axis(weights, first[..., None, None], -1)[..., 0]
    expected = np.where(np.broadcast_to(allowed, scores.shape).any(-1), expected, 0.0)
    np.testing.assert_allclose(share.numpy(), expected, atol=8 * EPS32 * size)
    alone = attention_entropy(q, k, softcap=softcap, sinks=given_sinks, **options)
    assert torch.equal(entropy.nan_to_num(-1), alone.nan_to_num(-1))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bias", "attention_mask"])
def test_a_raised_mask_hides_what_it_hid(narrow, wide, name):
    """Rows of hidden keys alone as well: the most negative number of a narrow dtype is a number of a wide one."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 9, 4, dtype=wide).unbind()
    keep = torch.rand(1, 1, 9, 9) < 0.7
    keep[:, :, :, 0], keep[:, :, 2] = False, False
    raised, exact = (
        torch.zeros(1, 1, 9, 9, dtype=dtype).masked_fill(~keep, hidden).to(wide)
        for dtype, hidden in ((narrow, torch.finfo(narrow).min), (wide, -math.inf))
    )
    for function in (attention_entropy, attention_entropy_reference):
        hidden: list[Any] = [{name: exact}, {name: raised}]
        expected, found = (function(q, k, is_causal=True, **each) for each in hidden)
        assert expected[:, :, [0, 2]].isnan().all()
        torch.testing.assert_close(found, expected, equal_nan=True)


def leaves(q, k, options, dtype):
    """q, k, bias and sinks as leaves with gradients, and the options without the latter two."""
    tensors: dict[str, Any] = {"q": q, "k": k} | {
        name: options[name] for name in ("bias", "sinks") if options[name] is not None
    }
    made = {name: each.to(dtype).detach().clone().requires_grad_() for name, each in tensors.items()}
    return made, {name: each for name, each in options.items() if name not in made}


@settings(max_examples=100, deadline=None)
@given(case=scoring_cases(magnitudes=(-1.0, 1.0)), seed=st.integers(0, 1000))
def test_gradients_agree_with_float64_autograd(case, seed):
    """In q, k, bias and sinks, each to 1e-5 of its norm and what the entropy's rounding adds."""
    q, k, options, _, _, _, size = case
    weight = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(seed))

    def gradients(function, dtype):
        tensors, others = leaves(q, k, options, dtype)
        entropy = function(**tensors, **others)
        (entropy.where(~entropy.isnan(), 0.0) * weight).sum().backward()
        return {name: each.grad.double() for name, each in tensors.items()}

    expected = gradients(attention_entropy_reference, torch.float64)
    lengths = {"bias": 1.0, "sinks": 1.0} | {
        name: float(other.double().norm(dim=-1).max()) for name, other in (("q", k), ("k", q))
    }
    for backend in backends_for(q, k, options):
        actual = gradients(partial(attention_entropy, backend=backend), torch.float32)
        for name, right in expected.items():
            most = 1e-5 * right.norm() + 8 * EPS32 * size * weight.norm() * lengths[name]
            assert actual[name].isfinite().all(), (backend, name)
            assert (actual[name] - right).norm() <= most, (backend, name)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks_shape", [None, (2,), (1, 2, 4)])
def test_gradients_of_the_reference_agree_with_finite_differences(softcap, sinks_shape):
    torch.manual_seed(0)
    q, k, bias = (torch.randn(1, n_head, n, 3, dtype=torch.float64) for n_head, n in ((2, 4), (1, 6), (2, 1)))
    bias = torch.randn(1, 2, 1, 6, dtype=torch.float64)
    mask = torch.rand(1, 1, 4, 6) < 0.7
    mask[..., 0] = True
    tensors = [q, k, bias] + ([] if sinks_shape is None else [torch.randn(sinks_shape, dtype=torch.float64)])

    def entropy(function, q, k, bias, sinks=None):
        return function(q, k, attention_mask=mask, softcap=softcap, bias=bias, sinks=sinks)

    inputs = [each.requires_grad_() for each in tensors]
    assert torch.autograd.gradcheck(partial(entropy, attention_entropy_reference), inputs)
    chunked = torch.autograd.grad(entropy(partial(attention_entropy, backend="chunked"), *inputs).sum(), inputs)
    exact = torch.autograd.grad(entropy(attention_entropy_reference, *inputs).sum(), inputs)
    for actual, right in zip(chunked, exact, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("logit", [-200.0, -40.0, 0.0, 40.0, 200.0])
def test_a_sink_before_uniform_scores_has_the_closed_form(backend, logit):
    """n keys of score 0 and a sink of logit b: π = 1 / (1 + n e^-b), H = (1 - π) ln n + h(π)."""
    q, k = torch.zeros(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
    entropy = attention_entropy(q, k, backend=backend, sinks=torch.full((2,), logit))
    n = np.arange(1, 65, dtype=np.float64)
    log_pi, log_rest = -np.logaddexp(0, np.log(n) - logit), -np.logaddexp(0, logit - np.log(n))
    expected = np.exp(log_rest) * (np.log(n) - log_rest) - np.exp(log_pi) * log_pi
    np.testing.assert_allclose(entropy[0].numpy(), np.broadcast_to(expected, (2, 64)), atol=3e-6, rtol=3e-6)


def test_the_bound_counts_the_sink():
    keys_and_sink = torch.zeros(1, 1, 128, 8), torch.randn(1, 1, 128, 8)
    entropy = attention_entropy(*keys_and_sink, sinks=torch.zeros(1), sliding_window=20)
    assert math.isclose(entropy.mean(), uniform_entropy_bound(128, sliding_window=20, has_sink=True), abs_tol=1e-6)
    assert math.isclose(uniform_entropy_bound(128, has_sink=True), np.log(np.arange(2, 130)).mean())
    assert uniform_entropy_bound(1, has_sink=True) == math.log(2)


def test_without_sinks_it_is_the_entropy_over_the_keys_renormalised():
    torch.manual_seed(0)
    q, k, sinks = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(4)
    weights = weights_of(scores_of(q, k, 8**-0.5), visible(9, 9, True, None), sinks.numpy()[None, :, None])[..., :-1]
    p = weights / weights.sum(-1, keepdims=True)
    expected = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    np.testing.assert_allclose(attention_entropy(q, k).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_sinks_make_nan_of_their_own_head(backend, bad):
    torch.manual_seed(0)
    q, k = torch.randn(1, 3, 6, 8), torch.randn(1, 3, 6, 8)
    sinks = torch.tensor([0.3, bad, -0.7])
    entropy = attention_entropy(q, k, sinks=sinks, backend=backend)
    assert entropy[0, 1].isnan().all()
    clean = attention_entropy(q, k, sinks=torch.tensor([0.3, 0.0, -0.7]), backend=backend)
    assert torch.equal(entropy[0, ::2], clean[0, ::2])


@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "cpu")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_biases_make_nan_of_exactly_the_queries_that_see_them(backend, bad):
    torch.manual_seed(0)
    q, k, bias = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 1, 6)
    clean = attention_entropy(q, k, bias=bias, backend=backend)
    bias[0, 1, 0, 3] = bad
    entropy = attention_entropy(q, k, bias=bias, backend=backend)
    assert entropy[0, 1, 3:].isnan().all()
    assert torch.equal(entropy[0, 1, :3], clean[0, 1, :3])
    assert torch.equal(entropy[0, 0], clean[0, 0])


@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "cpu")])
def test_a_soft_cap_bounds_scores_that_overflow(backend):
    """As in the model itself: tanh of an infinite score is 1. NaN stays NaN, and overflows are counted all the same."""
    q = torch.tensor([[1e30, 0.0], [1.0, math.nan]])[None, None]
    k = torch.tensor([[1e30, 0.0], [1.0, 0.0]])[None, None]
    entropy = attention_entropy(q, k, scale=1.0, is_causal=False, softcap=2.0, backend=backend)
    torch.testing.assert_close(entropy[0, 0], torch.tensor([math.log(2), math.nan]), equal_nan=True)
    assert count_nonfinite_scores(q, k, scale=1.0, is_causal=False).inf.tolist() == [1]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_hidden_keys_get_no_gradient_and_sinks_none_from_queries_without_keys(backend):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8).requires_grad_()
    sinks = torch.zeros(1, 2, 6, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    entropy = attention_entropy(q, k, attention_mask=mask, sinks=sinks, backend=backend)
    assert entropy[..., :2].isnan().all()
    of_k, of_sinks = torch.autograd.grad(entropy.where(~entropy.isnan(), 0.0).sum(), (k, sinks))
    assert (of_k[:, :, :2] == 0).all()
    assert (of_sinks[..., :2] == 0).all()
    assert (of_sinks[..., 2:] != 0).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_second_derivatives_are_refused_not_wrong(backend):
    sinks = torch.zeros(1, requires_grad=True)
    q, k = torch.randn(1, 1, 4, 8, requires_grad=True), torch.randn(1, 1, 4, 8)
    entropy = attention_entropy(q, k, sinks=sinks, backend=backend).sum()
    with pytest.raises(InputError, match="first derivative only"):
        torch.autograd.grad(entropy, q, create_graph=True)


@settings(max_examples=100, deadline=None)
@given(case=scoring_cases(magnitudes=(-1.0, 1.0)), learns=st.booleans())
def test_output_and_entropy_agree_with_float64_numpy(case, learns):
    q, k, options, allowed, scores, sinks, size = case
    v = torch.randn(*k.shape[:3], 7, generator=torch.Generator().manual_seed(0)).to(q.dtype)
    if learns:
        tensors, options = leaves(q, k, options, q.dtype)
        options |= {name: tensors[name] for name in ("bias", "sinks") if name in tensors}
    output, entropy = attention_and_entropy(q, k, v, **options)
    assert torch.equal(entropy.nan_to_num(-1), attention_entropy(q, k, **options).nan_to_num(-1))
    weights = np.nan_to_num(weights_of(scores, allowed, sinks))[..., : k.shape[2]]
    expected = weights @ np.repeat(v.double().numpy(), q.shape[1] // v.shape[1], axis=1)
    # torch's own attention rounds scores and weights to the inputs' precision on some paths
    eps = torch.finfo(q.dtype).eps if q.dtype != torch.float32 else 10 * EPS32
    assert output.dtype == q.dtype
    most = 4 * eps * size * float(v.abs().max())
    np.testing.assert_allclose(output.detach().double().numpy(), expected, rtol=0, atol=most)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_output_has_gradients_in_all_that_learns(softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 1, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def output_of(q, k, v, bias, sinks):
        return attention_and_entropy(q, k, v, softcap=softcap, bias=bias, sinks=sinks, backend="reference")[0]

    assert torch.autograd.gradcheck(output_of, (q, k, v, bias, sinks))
    output, entropy = attention_and_entropy(q, k, v, softcap=softcap, bias=bias, sinks=sinks)
    gradients = torch.autograd.grad(output.sum() + entropy.sum(), (q, k, v, bias, sinks))
    assert all(each.abs().sum() > 0 for each in gradients)


def test_auto_takes_a_backend_that_can():
    q, k, bias = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8), torch.ones(2, 1, 4)
    on_cpu = "compiled" if compiled_kernels.are_fast() else "cpu"
    for_all = "compiled" if compiled_kernels.are_fast() else "chunked"
    assert select_backend(q, k, softcap=50.0) == for_all
    assert select_backend(q, k, bias=bias) == for_all
    assert select_backend(q.double(), k, softcap=50.0) == "chunked"
    assert select_backend(q, k) == on_cpu


@pytest.mark.parametrize(
    ("given", "message"),
    [({"softcap": 50.0}, "without a soft-cap, got softcap=50; use 'auto'"), ({"bias": torch.ones(4)}, "not biases")],
)
def test_a_named_backend_that_cannot_refuses(given, message):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(InputError, match=message):
        attention_entropy(q, q, backend="cpu", **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap must be a positive number, got 0.0; pass None"),
        ({"softcap": -50.0}, "softcap must be a positive number"),
        ({"softcap": math.nan}, "softcap must be a positive number"),
        ({"softcap": math.inf}, "softcap must be a positive number"),
        ({"bias": torch.ones(3, 4)}, r"bias must be broadcastable to .* = \[1, 2, 4, 4\], got shape \[3, 4\]"),
        ({"bias": torch.ones(1, 1, 1, 4, 4)}, "bias must be broadcastable"),
        ({"bias": torch.ones(4, 4, dtype=torch.bool)}, "bias must have a floating-point dtype, got torch.bool"),
        ({"bias": torch.ones(4, 4, device="meta")}, "bias is on meta and q on cpu"),
        ({"sinks": torch.ones(3)}, r"sinks must be one logit a head \[n_head\] = \[2\]"),
        ({"sinks": torch.ones(1, 2, 3)}, "sinks must be one logit a head"),
        ({"sinks": torch.ones(2, dtype=torch.int64)}, "sinks must have a floating-point dtype"),
        ({"sinks": torch.ones(2, device="meta")}, "sinks are on meta and q on cpu"),
    ],
)
@pytest.mark.parametrize("with_output", [False, True])
def test_bad_input_is_named(change, message, with_output):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    function = partial(attention_and_entropy, v=torch.randn(1, 2, 4, 3)) if with_output else attention_entropy
    with pytest.raises(InputError, match=message):
        function(q, k, **change)
