import math
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.entropy import BACKENDS as ALL_BACKENDS
from normfree.entropy import attention_entropy, attention_entropy_reference, compiled_kernels, select_backend
from normfree.entropy import fused as fused_module
from normfree.entropy import visibility as visibility_module
from normfree.entropy.fused import attention_entropy_and_sink
from normfree.entropy.visibility import visibility_of
from normfree.errors import InputError

from .numpy_entropy import entropy_of, gradient_tolerances, scores_of, tolerance, visible

IS_COMPILED = compiled_kernels.kernels_refuse() is None
BACKENDS = [  # for triton see test_triton.py
    name for name in ALL_BACKENDS if name != "triton" and (name != "compiled" or IS_COMPILED)
]
WITHOUT_BIAS = ("cpu",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "padding", "bool", "per head", "-inf", "min", "bias"]


@st.composite
def attention_cases(draw, masks=MASKS, magnitudes=(0.0, 4.0)):
    batch, n_kv_head, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_query, n_cached = draw(st.integers(1, 40)), draw(st.sampled_from([0, 0, 1, 17]))
    head_dim, dtype = draw(st.sampled_from([1, 5, 16, 64])), draw(st.sampled_from(DTYPES))
    size = 10 ** draw(st.floats(*magnitudes))
    offset = draw(st.sampled_from([0.0, 0.0, 100.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    n_head, n_key = n_kv_head * group, n_query + n_cached
    q = (normal(batch, n_head, n_query, head_dim) * size**0.5).to(dtype)
    k = (normal(batch, n_kv_head, n_key, head_dim) * size**0.5 + offset * normal(1, 1, 1, head_dim)).to(dtype)
    is_causal, window = draw(st.booleans()), draw(st.sampled_from([None, None, 1, 5, 30]))
    allowed = visible(n_query, n_key, is_causal, window)[None, None]
    bias, kind = 0.0, draw(st.sampled_from(masks))
    shape = (batch, n_head if kind == "per head" else 1, n_query, n_key)
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.8]))
    mask = None
    if kind == "padding":
        keep = keep[:, 0, 0]
        mask, keep = keep.long(), keep[:, None, None]
    elif kind in ("bool", "per head"):
        mask = keep
    elif kind in ("-inf", "min"):
        hidden = -math.inf if kind == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(shape, dtype=dtype).masked_fill(~keep, hidden)
    elif kind == "bias":
        bias = normal(*shape) * 3
        mask = bias.masked_fill(~keep, -math.inf)
        bias = bias if keep.any() else 0.0
    if mask is not None:
        allowed = allowed & keep.numpy()
    options: dict[str, Any] = {"is_causal": is_causal, "attention_mask": mask, "sliding_window": window}
    return q, k, options, allowed, bias


@settings(max_examples=300, deadline=None)
@given(case=attention_cases(), small_blocks=st.booleans(), small_parts=st.booleans())
def test_every_backend_agrees_with_float64_numpy(case, small_blocks, small_parts):
    q, k, options, allowed, bias = case
    scale = q.shape[-1] ** -0.5
    expected = entropy_of(scores_of(q, k, scale) + np.asarray(bias), allowed)
    block_elements = 1 if small_blocks else visibility_module.BLOCK_ELEMENTS
    for name in ["auto", *BACKENDS]:
        if name in WITHOUT_BIAS and isinstance(bias, torch.Tensor):
            continue
        with (
            patch.object(visibility_module, "BLOCK_ELEMENTS", block_elements),
            patch.object(fused_module, "PART_ELEMENTS", 1 if small_parts else fused_module.PART_ELEMENTS),
        ):
            entropy = attention_entropy(q, k, backend=name, **options)
        assert entropy.dtype == torch.float32
        assert entropy.shape == q.shape[:3]
        assert not (entropy < 0).any()
        np.testing.assert_allclose(entropy.numpy(), expected, rtol=0, atol=tolerance(q, k, scale, bias), err_msg=name)


@settings(max_examples=100, deadline=None)
@given(case=attention_cases(magnitudes=(0.0, 1.0)))
def test_float64_reference_is_exact(case):
    q, k, options, allowed, bias = case
    expected = entropy_of(scores_of(q, k, 0.7) + np.asarray(bias), allowed)
    entropy = attention_entropy_reference(q, k, scale=0.7, **options)
    assert entropy.dtype == torch.float64
    np.testing.assert_allclose(entropy.numpy(), expected, rtol=0, atol=1e-8)


def gradients_of(entropy_of_q_and_k, q, k, weight, dtype):
    """Float64 gradients in q and k of Σ weight · entropy over the queries that see a key."""
    q, k = (tensor.to(dtype).detach().clone().requires_grad_() for tensor in (q, k))
    entropy = entropy_of_q_and_k(q, k)
    (entropy.where(~entropy.isnan(), 0.0) * weight).sum().backward()
    return q.grad.double(), k.grad.double()


@settings(max_examples=200, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 1.0)), seed=st.integers(0, 1000))
def test_gradients_agree_with_float64_autograd(case, seed):
    q, k, options, _, bias = case
    weight = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(seed))
    reference = partial(attention_entropy_reference, **options)
    expected = gradients_of(reference, q, k, weight, torch.float64)
    allowed = gradient_tolerances(q, k, q.shape[-1] ** -0.5, bias, weight, expected)
    for name in BACKENDS:
        if name in WITHOUT_BIAS and isinstance(bias, torch.Tensor):
            continue
        entropy = partial(attention_entropy, backend=name, **options)
        actual = gradients_of(entropy, q, k, weight, torch.float32)
        for mine, right, most in zip(actual, expected, allowed, strict=True):
            assert mine.isfinite().all()
            assert (mine - right).norm() <= most


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1.0, 3.0])
def test_gradients_of_ordinary_heads_are_within_1e_5(backend, masked, size):
    torch.manual_seed(0)
    q, k, weight = size * torch.randn(2, 4, 128, 64), 5 + torch.randn(2, 2, 128, 64), torch.randn(2, 4, 128)
    mask = torch.rand(2, 1, 128, 128) < 0.7 if masked else None
    reference = partial(attention_entropy_reference, attention_mask=mask)
    expected = gradients_of(reference, q, k, weight, torch.float64)
    entropy = partial(attention_entropy, attention_mask=mask, backend=backend)
    actual = gradients_of(entropy, q, k, weight, torch.float32)
    for mine, right in zip(actual, expected, strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm()


def test_gradient_of_the_reference_agrees_with_finite_differences():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 4, 6) < 0.7
    mask[..., 0] = True
    assert torch.autograd.gradcheck(lambda q, k: attention_entropy_reference(q, k, attention_mask=mask), (q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_get_no_gradient(backend):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    entropy = attention_entropy(q, k, attention_mask=mask, backend=backend)
    assert entropy[..., :2].isnan().all()
    (gradient,) = torch.autograd.grad(entropy[..., 2:].sum(), k)
    assert (gradient[:, :, :2] == 0).all()
    assert gradient[:, :, 2:].abs().sum() > 0


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_second_derivatives_are_refused_not_wrong(backend):
    q, k = torch.randn(1, 1, 4, 8, requires_grad=True), torch.randn(1, 1, 4, 8)
    entropy = attention_entropy(q, k, backend=backend).sum()
    with pytest.raises(InputError, match="first derivative only"):
        torch.autograd.grad(entropy, q, create_graph=True)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_uniform_scores_give_the_logarithm_of_the_visible_keys(backend, head_dim):
    q, k = torch.zeros(2, 3, 128, head_dim), torch.randn(2, 3, 128, head_dim)
    entropy = attention_entropy(q, k, backend=backend)
    expected = torch.arange(1, 129).log().expand(2, 3, -1)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_keys_make_nan_of_exactly_the_queries_that_see_them(backend, bad):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 12, 8).abs(), torch.randn(1, 2, 12, 8)
    clean = attention_entropy(q, k)
    k[0, 1, 7, 3] = bad
    entropy = attention_entropy(q, k, backend=backend)
    assert entropy[0, 1, 7:].isnan().all()
    torch.testing.assert_close(entropy[0, 1, :7], clean[0, 1, :7], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy[0, 0], clean[0, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_nonfinite_queries_and_overflowing_scores_give_nan(backend):
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    q[0, 0, 3, 0] = math.nan
    q[0, 0, 4] = 3e38 * k[0, 0, 4].sign()
    entropy = attention_entropy(q, k, backend=backend)
    assert entropy.isnan().tolist() == [[[False, False, False, True, True, False]]]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_layouts_with_strided_head_dim(backend):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 8, 20).transpose(2, 3), torch.randn(2, 2, 8, 20).transpose(2, 3)
    expected = entropy_of(scores_of(q, k, 8**-0.5), visible(20, 20, True, None))
    np.testing.assert_allclose(attention_entropy(q, k, backend=backend).numpy(), expected, atol=5e-6)


def test_autocast_does_not_coarsen_the_entropy():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)
    for backend in BACKENDS:
        with torch.autocast("cpu", torch.bfloat16):
            inside = attention_entropy(q, k, backend=backend)
        assert torch.equal(inside, attention_entropy(q, k, backend=backend))


def test_long_rows_need_no_square_of_memory():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 65_536, 16)
    expected = entropy_of(scores_of(q, k, 0.25), np.ones((1, 1), dtype=bool))
    for backend in BACKENDS:
        np.testing.assert_allclose(attention_entropy(q, k, backend=backend).numpy(), expected, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 2.0)))
def test_sink_share_is_the_weight_of_the_first_visible_key(case):
    q, k, options, allowed, bias = case
    scores = scores_of(q, k, 0.5) + np.asarray(bias)
    allowed = np.broadcast_to(allowed, scores.shape)
    given = options["attention_mask"]
    scored = np.where(allowed, scores, -np.inf)
    with np.errstate(all="ignore"):
        p = np.exp(scored - scored.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
    visibility = visibility_of(q, k, **options)
    _, share = attention_entropy_and_sink(q, k, 0.5, visibility, "auto")
    keep = np.ones((1, 1, 1, k.shape[2]), dtype=bool)
    if given is not None:
        visible_from = torch.finfo(given.dtype).min / 2 if given.is_floating_point() else 0
        keep = ((given[:, None, None] if given.dim() == 2 else given) > visible_from).numpy()
    first = np.broadcast_to(keep.any(2).argmax(-1), scores.shape[:2])
    expected = np.take_along_axis(p, first[..., None, None], -1)[..., 0]
    expected = np.where(allowed.any(-1), expected, 0.0)
    np.testing.assert_allclose(share.numpy(), expected, atol=10 * tolerance(q, k, 0.5, bias))


def test_select_backend_tells_what_auto_takes():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
    on_cpu = "compiled" if compiled_kernels.are_fast() else "cpu"
    assert select_backend(q, k) == on_cpu
    assert select_backend(q, k, attention_mask=torch.zeros(1, 1, 4, 4)) == on_cpu
    assert select_backend(q.double(), k) == "cpu"
    biased = "compiled" if compiled_kernels.are_fast() else "chunked"
    assert select_backend(q, k, attention_mask=torch.ones(1, 1, 4, 4)) == biased
    assert select_backend(q.double(), k, attention_mask=torch.ones(1, 1, 4, 4)) == "chunked"
    assert select_backend(q.to("meta"), k.to("meta")) == "chunked"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 4, 8)}, r"q must be non-empty, \[batch, n_head, T, head_dim\]"),
        ({"q": torch.zeros(1, 2, 4, 8, dtype=torch.int64)}, "floating-point dtype"),
        ({"k": torch.randn(1, 2, 4, 9)}, "must agree in batch"),
        ({"q": torch.randn(1, 3, 4, 8)}, "multiple of n_kv_head"),
        ({"q": torch.randn(1, 2, 5, 8)}, "at least as many keys"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"backend": "cup"}, "unknown entropy backend 'cup' .did you mean 'cpu'"),
        ({"attention_mask": torch.ones(1, 4)}, "padding mask, bool or integer"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, "padding mask, bool or integer"),
        ({"attention_mask": torch.ones(1, 1, 3, 4)}, "must be broadcastable"),
        ({"attention_mask": torch.ones(1, 1, 4, 1)}, "must be broadcastable"),
        ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.int64)}, "must be bool"),
        ({"attention_mask": torch.ones(1, 1, 4, 4, requires_grad=True)}, r"detach\(\)"),
        ({"attention_mask": torch.ones(1, 1, 4, 4), "backend": "cpu"}, "use 'auto' or 'chunked'"),
        ({"q": torch.zeros(1, 2, 4, 8, device="meta")}, "put them on one device"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments: dict[str, Any] = {"q": torch.randn(1, 2, 4, 8), "k": torch.randn(1, 2, 4, 8)} | change
    with pytest.raises(InputError, match=message):
        attention_entropy(arguments.pop("q"), arguments.pop("k"), **arguments)
