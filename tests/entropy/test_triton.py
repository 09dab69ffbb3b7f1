"""The Triton kernels: on a GPU where there is one, otherwise in Triton's interpreter (see tests/__init__.py)."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.entropy import (
    attention_and_entropy,
    attention_entropy,
    attention_entropy_reference,
    select_backend,
)
from normfree.entropy.fused import attention_entropy_and_sink
from normfree.entropy.visibility import visibility_of
from normfree.errors import InputError

from .numpy_entropy import EPS32, entropy_of, gradient_tolerances, scores_of, tolerance, visible, weights_of

pytest.importorskip("triton", reason="triton is not installed: pip install 'normfree[dev]'")
# the interpreter computes with NumPy, which warns where the kernels make NaN on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
entropy_by_triton = partial(attention_entropy, backend="triton")


@st.composite
def attention_cases(draw, magnitudes=(0.0, 4.0)):
    """q, k, options and the visible pairs [batch, head, query, key], sizes around those of a tile."""
    batch, n_kv_head, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n_query, n_cached = draw(st.sampled_from([1, 5, 64, 70, 130])), draw(st.sampled_from([0, 0, 1, 60]))
    head_dim, dtype = draw(st.sampled_from([1, 16, 20, 80, 256])), draw(st.sampled_from(DTYPES))
    size = 10 ** draw(st.floats(*magnitudes))
    offset = draw(st.sampled_from([0.0, 0.0, 100.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    n_head, n_key = n_kv_head * group, n_query + n_cached
    q = (normal(batch, n_head, n_query, head_dim) * size**0.5).to(dtype)
    k = (normal(batch, n_kv_head, n_key, head_dim) * size**0.5 + offset * normal(1, 1, 1, head_dim)).to(dtype)
    is_causal, window = draw(st.booleans()), draw(st.sampled_from([None, None, 1, 5, 90]))
    allowed = visible(n_query, n_key, is_causal, window)[None, None]
    kind, mask = draw(st.sampled_from(["none", "padding", "bool", "per head", "-inf"])), None
    shape = (batch, n_head if kind == "per head" else 1, n_query, n_key)
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.8]))
    if kind == "padding":
        keep = keep[:, 0, 0]
        mask, keep = keep.long(), keep[:, None, None]
    elif kind != "none":
        mask = keep if kind != "-inf" else torch.zeros(shape).masked_fill(~keep, -math.inf)
    if mask is not None:
        allowed = allowed & keep.numpy()
    return q, k, {"is_causal": is_causal, "attention_mask": mask, "sliding_window": window}, allowed


def promised(q, k, scale):
    """The tolerance of the docstring: half-precision keys are not centred."""
    if q.dtype == torch.float32:
        return tolerance(q, k, scale)
    lengths = [float(each.double().norm(dim=-1).max()) for each in (q, k)]
    return 4 * EPS32 * (1 + scale * lengths[0] * lengths[1])


def with_sinks(q, k, options, seed=0):
    """The options with logits of learned sinks, and the float64 tolerance of scores next to them."""
    sinks = torch.randn(q.shape[1], generator=torch.Generator().manual_seed(seed))
    lengths = [float(each.double().norm(dim=-1).max()) for each in (q, k)]
    tolerance = 4 * EPS32 * (1 + q.shape[-1] ** -0.5 * lengths[0] * lengths[1] + float(sinks.abs().max()))
    return options | {"sinks": sinks.to(DEVICE)}, sinks.double().numpy()[None, :, None], tolerance


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@settings(max_examples=50, deadline=None)
@given(case=attention_cases())
def test_agrees_with_float64_numpy(case):
    q, k, options, allowed = case
    scale = q.shape[-1] ** -0.5
    expected = entropy_of(scores_of(q, k, scale), allowed)
    entropy = entropy_by_triton(*on_device(q, k), **options).cpu()
    assert entropy.dtype == torch.float32
    assert not (entropy < 0).any()
    np.testing.assert_allclose(entropy.numpy(), expected, rtol=0, atol=promised(q, k, scale))


def gradients_of(function, q, k, weight, *, dtype):
    q, k = (each.to(dtype).detach().clone().requires_grad_() for each in (q, k))
    entropy = function(q, k)
    (entropy.where(~entropy.isnan(), 0.0) * weight).sum().backward()
    return q.grad.double().cpu(), k.grad.double().cpu()


@settings(max_examples=15, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 1.0)), seed=st.integers(0, 1000))
def test_gradients_agree_with_float64_autograd(case, seed):
    q, k, options, _ = case
    weight = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(seed))
    expected = gradients_of(partial(attention_entropy_reference, **options), q, k, weight, dtype=torch.float64)
    allowed = gradient_tolerances(q, k, q.shape[-1] ** -0.5, 0.0, weight, expected)
    entropy = partial(entropy_by_triton, **options)
    actual = gradients_of(entropy, *on_device(q, k, weight), dtype=torch.float32)
    for mine, right, most in zip(actual, expected, allowed, strict=True):
        assert mine.isfinite().all()
        assert (mine - right).norm() <= most


@settings(max_examples=20, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 2.0)))
def test_sinks_join_the_kernel_s_softmax(case):
    q, k, options, allowed = case
    options, sinks, tolerance = with_sinks(q, k, options)
    expected = entropy_of(scores_of(q, k, q.shape[-1] ** -0.5), allowed, sinks)
    entropy = entropy_by_triton(*on_device(q, k), **options).cpu()
    np.testing.assert_allclose(entropy.numpy(), expected, rtol=0, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 1.0)), seed=st.integers(0, 1000))
def test_gradients_with_sinks_agree_with_float64_autograd(case, seed):
    q, k, options, _ = case
    options, _, tolerance = with_sinks(q, k, options, seed)
    weight = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(seed))
    on_cpu: dict[str, Any] = options | {"sinks": options["sinks"].cpu()}
    expected = gradients_of(partial(attention_entropy_reference, **on_cpu), q, k, weight, dtype=torch.float64)
    actual = gradients_of(partial(entropy_by_triton, **options), *on_device(q, k, weight), dtype=torch.float32)
    for mine, right, other in zip(actual, expected, (k, q), strict=True):
        most = 1e-5 * right.norm() + 2 * tolerance * weight.norm() * other.double().norm(dim=-1).max()
        assert mine.isfinite().all()
        assert (mine - right).norm() <= most


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_gradients_of_ordinary_heads_are_within_1e_5_and_repeat(size):
    torch.manual_seed(0)
    q, k, weight = size * torch.randn(1, 4, 128, 64), 5 + torch.randn(1, 2, 128, 64), torch.randn(1, 4, 128)
    expected = gradients_of(attention_entropy_reference, q, k, weight, dtype=torch.float64)
    first, second = (gradients_of(entropy_by_triton, *on_device(q, k, weight), dtype=torch.float32) for _ in range(2))
    for mine, again, right in zip(first, second, expected, strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm()
        assert torch.equal(mine, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_inputs_are_rounded_once(dtype):
    torch.manual_seed(0)
    q, k, weight = torch.randn(1, 2, 70, 32).to(dtype), torch.randn(1, 2, 70, 32).to(dtype), torch.randn(1, 2, 70)
    expected = gradients_of(attention_entropy_reference, q, k, weight, dtype=torch.float64)
    actual = gradients_of(entropy_by_triton, *on_device(q, k, weight), dtype=dtype)
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_second_derivatives_are_refused_not_wrong():
    q, k = on_device(torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16))
    entropy = entropy_by_triton(q.requires_grad_(), k).sum()
    with pytest.raises(InputError, match="first derivative only"):
        torch.autograd.grad(entropy, q, create_graph=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_keys_make_nan_of_exactly_the_queries_that_see_them(bad):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 90, 8).abs(), torch.randn(1, 2, 90, 8)
    clean = attention_entropy(q, k, backend="reference")
    k[0, 1, 7, 3] = bad
    entropy = entropy_by_triton(*on_device(q, k)).cpu()
    assert entropy[0, 1, 7:].isnan().all()
    torch.testing.assert_close(entropy[0, 1, :7], clean[0, 1, :7], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy[0, 0], clean[0, 0], rtol=0, atol=2e-6)


def test_nonfinite_queries_and_overflowing_scores_give_nan():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    q[0, 0, 3, 0] = math.nan
    q[0, 0, 4] = 3e38 * k[0, 0, 4].sign()
    entropy = entropy_by_triton(*on_device(q, k))
    assert entropy.isnan().tolist() == [[[False, False, False, True, True, False]]]


def test_layouts_with_strided_head_dim_and_one_row_over_many_keys():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 8, 20).transpose(2, 3), torch.randn(2, 2, 8, 20).transpose(2, 3)
    expected = entropy_of(scores_of(q, k, 8**-0.5), visible(20, 20, True, None))
    np.testing.assert_allclose(entropy_by_triton(*on_device(q, k)).cpu().numpy(), expected, atol=5e-6)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 8192, 16)
    expected = entropy_of(scores_of(q, k, 0.25), np.ones((1, 1), dtype=bool))
    np.testing.assert_allclose(entropy_by_triton(*on_device(q, k)).cpu().numpy(), expected, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sink_share_is_the_weight_of_the_first_visible_key(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 33, 16).to(dtype), torch.randn(2, 2, 33, 16).to(dtype)
    padding = torch.ones(2, 33, dtype=torch.bool)
    padding[1, :4] = False
    visibility = visibility_of(*on_device(q, k), is_causal=True, attention_mask=padding, sliding_window=None)
    _, share = attention_entropy_and_sink(q.to(DEVICE), k.to(DEVICE), 0.25, visibility, "triton")
    seen = visible(33, 33, True, None) & padding.numpy()[:, None, None]
    scores = np.where(seen, scores_of(q, k, 0.25), -np.inf)
    with np.errstate(all="ignore"):
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
    expected = np.stack([p[0, ..., 0], np.where(seen[1].any(-1), p[1, ..., 4], 0.0)])
    np.testing.assert_allclose(share.cpu().numpy(), expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 1.0)), value_dim=st.sampled_from([3, 16, 40]))
def test_output_and_entropy_in_one_pass(case, value_dim):
    q, k, options, allowed = case
    v = torch.randn(*k.shape[:3], value_dim, generator=torch.Generator().manual_seed(0)).to(q.dtype)
    scale = q.shape[-1] ** -0.5
    output, entropy = attention_and_entropy(*on_device(q, k, v), backend="triton", **options)
    scores = scores_of(q, k, scale)
    np.testing.assert_allclose(entropy.cpu().numpy(), entropy_of(scores, allowed), rtol=0, atol=promised(q, k, scale))
    scores = np.where(allowed, scores, -np.inf)
    with np.errstate(all="ignore"):
        p = np.nan_to_num(np.exp(scores - scores.max(-1, keepdims=True)))
        p = np.nan_to_num(p / p.sum(-1, keepdims=True))
    expected = p @ np.repeat(v.double().numpy(), q.shape[1] // v.shape[1], axis=1)
    rounding = 2 * torch.finfo(q.dtype).eps * float(v.abs().max()) + 10 * promised(q, k, scale)
    assert output.dtype == q.dtype
    np.testing.assert_allclose(output.double().cpu().numpy(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_entropy_in_one_pass_with_sinks(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n_head, 33, 16).to(dtype) for n_head in (4, 2, 2))
    options, sinks, tolerance = with_sinks(q, k, {})
    output, entropy = attention_and_entropy(*on_device(q, k, v), backend="triton", **options)
    scores, allowed = scores_of(q, k, 0.25), visible(33, 33, True, None)
    np.testing.assert_allclose(entropy.cpu().numpy(), entropy_of(scores, allowed, sinks), rtol=0, atol=tolerance)
    expected = weights_of(scores, allowed, sinks)[..., :-1] @ np.repeat(v.double().numpy(), 2, axis=1)
    rounding = 3 * torch.finfo(dtype).eps * float(v.abs().max()) + 10 * tolerance
    assert output.dtype == dtype
    np.testing.assert_allclose(output.double().cpu().numpy(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 50.0}, "takes scores without a soft-cap, got softcap=50"),
        ({"bias": torch.ones(4, 4)}, "not biases"),
        ({"q": torch.randn(1, 2, 4, 8, dtype=torch.float64)}, "computes in float32"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "float masks that add"),
        ({"q": torch.randn(1, 2, 4, 300), "k": torch.randn(1, 2, 4, 300)}, "head dims up to 256"),
    ],
)
def test_unfit_inputs_are_named_and_auto_takes_another_backend(change, message):
    arguments: dict[str, Any] = {"q": torch.randn(1, 2, 4, 8), "k": torch.randn(1, 2, 4, 8)} | change
    q, k = on_device(arguments.pop("q"), arguments.pop("k"))
    with pytest.raises(InputError, match=message):
        entropy_by_triton(q, k, **arguments)
    assert select_backend(q, k, **arguments) != "triton"
    assert attention_entropy(q, k, **arguments).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_triton_on_cuda(dtype):
    q, k = torch.randn(1, 2, 8, 64, device="cuda", dtype=dtype), torch.randn(1, 2, 8, 64, device="cuda", dtype=dtype)
    assert select_backend(q, k) == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_64k_tokens_in_linear_memory(dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 65_536, 64, device="cuda", dtype=dtype) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entropy = attention_entropy(q, k)
    assert torch.cuda.max_memory_allocated() - before < 8 * k.numel() * 4
    last = attention_entropy_reference(q[:, :, -64:], k)
    torch.testing.assert_close(entropy[:, :, -64:].double(), last, rtol=0, atol=promised(q.cpu(), k.cpu(), 0.125))
