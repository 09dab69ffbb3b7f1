"""The compiled attention against the definition in float64: output, gradients, entropy."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfree.entropy.compiled_attention import MOST_TOKENS, Attended, causal_attention, refuses, takes

from .numpy_entropy import entropy_of, scores_of, tolerance, visible

pytestmark = pytest.mark.skipif(refuses() is not None, reason="no compiled kernels")


def made_up(
    n_head: int,
    n_kv_head: int,
    n_token: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [2, heads, n_token, head_dim], in memory as projections make them: [2, n_token, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(2, n_token, n, head_dim, generator=generator) for n in (n_head, n_kv_head, n_kv_head))
    q, k, v = ((each * size).to(dtype).transpose(1, 2).requires_grad_() for each in made)
    return q, k, v


def attend(inputs: Iterable[Tensor], scale: float) -> Attended:
    q, k, v = inputs
    return causal_attention(q, k, v, scale)


def definition(inputs: Iterable[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Output [batch, T, n_head, head_dim] and weights, of float64."""
    q, k, v = inputs
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    p = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return (p @ v).transpose(1, 2), p


def gradients_of(inputs: Iterable[Tensor]) -> list[Tensor]:
    return [each.grad for each in inputs if each.grad is not None]


def differences(found: list[Any], expected: list[Any]) -> list[float]:
    """The largest difference of each pair, relative to the largest number."""
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    n_token=st.integers(2, 150),
    head_dim=st.sampled_from([1, 5, 16, 32, 40, 64, 80]),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_output_and_gradients_are_those_of_float64(n_token, head_dim, heads, dtype, size, seed):
    inputs = made_up(heads[0], heads[1], n_token, head_dim, dtype=dtype, seed=seed, size=size)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    scale = 0.9 * head_dim**-0.5
    output, entropy, first = attend(inputs, scale)
    expected, p = definition(wide, scale)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    output.backward(gradient)
    expected.backward(gradient.double())
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    # Where a weight is close to 1, p (dp - sum of p dp) cancels, and what rounds is dp = gradient . v.
    q, k, v = (float(each.detach().norm(dim=-1).max()) for each in wide)
    rounds = 2 * torch.finfo(dtype).eps * float(gradient.double().norm(dim=-1).max()) * v * scale
    least = (0.0, rounds * k, rounds * q * n_token * heads[0] / heads[1], 0.0)
    found, right = [output.detach(), *gradients_of(inputs)], [expected.detach(), *gradients_of(wide)]
    for a, b, rounding in zip(found, right, least, strict=True):
        assert (a.double() - b).abs().max() <= bound * b.abs().max() + rounding
    by_numpy = entropy_of(scores_of(*inputs[:2], scale), visible(n_token, n_token, True, None)[None, None])
    np.testing.assert_allclose(entropy.numpy(), by_numpy, rtol=0, atol=tolerance(*inputs[:2], scale))
    torch.testing.assert_close(first.double(), p[..., 0].detach(), rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_results_alone(dtype):
    q, k, v = made_up(2, 2, 100, 32, dtype=dtype)
    wide = [each.detach().float().requires_grad_() for each in (q, k, v)]
    narrow, whole = causal_attention(q, k, v, 0.2), attend(wide, 0.2)
    gradient = torch.randn_like(narrow.output)
    narrow.output.backward(gradient)
    whole.output.backward(gradient.float())
    assert torch.equal(narrow.output, whole.output.to(dtype))
    for a, b in zip(gradients_of((q, k, v)), gradients_of(wide), strict=True):
        assert torch.equal(a, b.to(dtype))
    assert torch.equal(narrow.entropy, whole.entropy)


def test_the_number_of_threads_changes_nothing():
    def results(n_thread):
        torch.set_num_threads(n_thread)
        inputs = made_up(4, 2, 70, 32)
        output, entropy, first = attend(inputs, 0.2)
        output.square().sum().backward()
        return [output, entropy, first, *gradients_of(inputs)]

    before = torch.get_num_threads()
    try:
        assert all(map(torch.equal, results(1), results(3)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_not_finite_goes_where_it_is_seen(place, bad):
    inputs = made_up(2, 2, 40, 16)
    with torch.no_grad():
        inputs[["query", "key", "value"].index(place)][0, 1, 20, 3] = bad
    output, entropy, first = attend(inputs, 0.2)
    sees = torch.zeros(2, 2, 40, dtype=torch.bool)
    sees[0, 1, 20 if place == "query" else slice(20, None)] = True
    is_bad = ~output.isfinite().all(-1).transpose(1, 2)
    if place == "value":  # times a weight of 0, a hidden value is NaN: here for up to 8 queries, in PyTorch for all
        assert entropy.isfinite().all()
        assert is_bad[sees].all()
        assert not is_bad[:, :, :16].any()
        sees[0, 1, 16:] = True
    elif bad == torch.inf and place == "key":  # a score of -inf is a weight of 0
        assert torch.equal(entropy.isnan(), sees)
        assert (sees | ~is_bad).all()
    else:
        assert torch.equal(is_bad, sees)
        assert torch.equal(entropy.isnan(), sees)
        assert torch.equal(first.isnan(), sees)
    expected, _ = definition((each.detach().double() for each in made_up(2, 2, 40, 16)), 0.2)
    kept = ~sees.transpose(1, 2)
    torch.testing.assert_close(output[kept].double(), expected[kept], rtol=0, atol=1e-5)


def test_one_score_of_minus_infinity_is_a_weight_of_zero():
    q, k, v = (each.detach() for each in made_up(1, 1, 8, 4))
    q[..., 0], k[..., 0], k[:, :, 3, 0] = 1e20, 1.0, -3e38
    output, entropy, _ = causal_attention(q, k, v, 1.0)
    expected, _ = definition((q.double(), k.double(), v.double()), 1.0)
    assert entropy[:, :, 3:].isnan().all()
    assert entropy[:, :, :3].isfinite().all()
    torch.testing.assert_close(output[:, 4:].double(), expected[:, 4:], rtol=0, atol=1e-5)


def test_large_scores_keep_their_precision():
    q, k, v = made_up(2, 2, 64, 16, size=40.0)
    output = causal_attention(q, k, v, 1.0).output.detach()
    expected, _ = definition((each.detach().double() for each in (q, k, v)), 1.0)
    assert max(differences([output], [expected])) < 2e-3  # scores of 1e4 in float32


def test_any_strides_will_do():
    q, k, v = (each.detach() for each in made_up(2, 2, 33, 16))
    expected = causal_attention(q, k, v, 0.3)
    spread = torch.zeros(2, 2, 33, 16, 2)
    spread[..., 0] = q
    together = torch.cat([k, v], dim=-1)
    found = causal_attention(spread[..., 0], together[..., :16], together[..., 16:], 0.3)
    assert all(map(torch.equal, found, expected))
    once = torch.ones(1, 33, 2, 16).expand(2, -1, -1, -1)
    inputs = made_up(2, 2, 33, 16)
    attend(inputs, 0.3).output.backward(once)
    others = made_up(2, 2, 33, 16)
    attend(others, 0.3).output.backward(once.contiguous())
    assert all(map(torch.equal, gradients_of(inputs), gradients_of(others)))


def test_it_compiles_whole():
    q, k, v = made_up(2, 2, 24, 16)
    attend = torch.compile(lambda q, k, v: causal_attention(q, k, v, 0.3), fullgraph=True, backend="aot_eager")
    output, entropy, _ = attend(q, k, v)
    expected = causal_attention(q, k, v, 0.3)
    assert torch.equal(output, expected.output)
    assert torch.equal(entropy, expected.entropy)
    found, wanted = (torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (output, expected.output))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_every_build_agrees(library_for, instructions):
    library_for("attention", instructions)
    inputs = made_up(4, 2, 77, 24)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    output, expected = attend(inputs, 0.2).output, definition(wide, 0.2)[0]
    output.square().sum().backward()
    expected.square().sum().backward()
    found = [output.detach(), *gradients_of(inputs)]
    assert max(differences(found, [expected.detach(), *gradients_of(wide)])) < 1e-5


def test_without_kernels_nothing_is_taken(without_libraries):
    assert not takes(*made_up(2, 2, 24, 16))


def test_what_is_not_taken():
    q, k, v = made_up(2, 2, 24, 16)
    assert takes(q, k, v)
    assert takes(*(each.bfloat16() for each in (q, k, v)))
    assert takes(*(each.half() for each in (q, k, v)))
    for others in (
        (q.double(), k.double(), v.double()),
        (q, k, v.bfloat16()),
        (q[:, :, :1], k[:, :, :1], v[:, :, :1]),
        (q[:, :, 3:], k, v),
        (q, k, v[..., :8]),
        (q.to("meta"), k.to("meta"), v.to("meta")),
        tuple(torch.zeros(1, 1, MOST_TOKENS + 1, 4) for _ in range(3)),
    ):
        assert not takes(*others)
