"""Top-k, statistical and exact, against float64 NumPy; the count under Gaussian input against its own theory."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, pi, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm
from torch import Tensor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

import normfree
from normfree.errors import InputError
from normfree.spark import TOPKS, exact_topk, exact_topk_mask, statistical_topk, statistical_topk_mask

from . import numpy_topk

SOFT: dict[str, Callable[..., Tensor]] = {"statistical": statistical_topk, "exact": exact_topk}
MASK: dict[str, Callable[..., Tensor]] = {"statistical": statistical_topk_mask, "exact": exact_topk_mask}

seeds = st.integers(0, 2**32 - 1)


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = np.random.default_rng(seed)
    scale, shift = np.exp(generator.normal(0, 2)), generator.normal(0, 3)
    return torch.from_numpy(shift + scale * generator.standard_t(4, shape)).to(dtype)


def test_the_public_name_is_the_statistical_one() -> None:
    assert normfree.statistical_topk is statistical_topk
    assert set(TOPKS) == {"statistical", "exact"}
    for name, topk in TOPKS.items():
        assert (topk.soft_threshold, topk.mask) == (SOFT[name], MASK[name])


@settings(max_examples=60, deadline=None)
@given(seed=seeds, d=st.integers(2, 300), n=st.integers(1, 4), data=st.data())
def test_soft_thresholds_are_those_of_the_equations(seed: int, d: int, n: int, data: Any) -> None:
    k = data.draw(st.integers(1, d - 1))
    x = rows(seed, n, d, dtype=torch.float64)
    reference = numpy_topk.soft_threshold(x.numpy(), numpy_topk.statistical_threshold(x.numpy(), k / d))
    np.testing.assert_allclose(statistical_topk(x, k).numpy(), reference, rtol=1e-9, atol=1e-9 * float(x.abs().max()))
    reference = numpy_topk.soft_threshold(x.numpy(), numpy_topk.exact_threshold(x.numpy(), k))
    np.testing.assert_array_equal(exact_topk(x, k).numpy(), reference)
    assert (exact_topk(x, k) > 0).sum(-1).tolist() == [k] * n


@settings(max_examples=30, deadline=None)
@given(seed=seeds, d=st.integers(2, 200), share=st.floats(0.005, 1, exclude_max=True))
def test_a_float_is_a_share(seed: int, d: int, share: float) -> None:
    x = rows(seed, 3, d, dtype=torch.float64)
    reference = numpy_topk.soft_threshold(x.numpy(), numpy_topk.statistical_threshold(x.numpy(), share))
    np.testing.assert_allclose(
        statistical_topk(x, share).numpy(), reference, rtol=1e-9, atol=1e-9 * float(x.abs().max())
    )
    count = max(1, round(share * d))
    assert torch.equal(exact_topk(x, share), exact_topk(x, count))
    assert torch.equal(exact_topk_mask(x, share), exact_topk_mask(x, count))


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_any_dimension(name: str, dim: int) -> None:
    x = rows(1, 7, 9, 11)
    moved = SOFT[name](x.movedim(dim, -1), 3).movedim(-1, dim)
    torch.testing.assert_close(SOFT[name](x, 3, dim=dim), moved)
    assert torch.equal(MASK[name](x, 3, dim=dim), MASK[name](x.movedim(dim, -1), 3).movedim(-1, dim))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_it_is_the_operator_of_gemma_3n(share: float) -> None:
    x = rows(2, 5, 512)
    theirs = Gemma3nTextMLP._gaussian_topk(SimpleNamespace(activation_sparsity=1 - share), x)  # type: ignore[arg-type]
    torch.testing.assert_close(statistical_topk(x, share), theirs, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    x = (100 + rows(3, 6, 400).clamp(-30, 30)).to(dtype)
    result = SOFT[name](x, 32)
    assert result.dtype == dtype
    torch.testing.assert_close(result, SOFT[name](x.float(), 32).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("k", [1, 5, 0.3, 17])
def test_gradients(name: str, k: int | float) -> None:
    x = torch.randn(3, 17, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: SOFT[name](x, k), (x,))


@pytest.mark.parametrize("name", SOFT)
def test_all_of_a_row_is_the_row(name: str) -> None:
    x = rows(4, 3, 12)
    for everything in (12, 1.0):
        assert torch.equal(SOFT[name](x, everything), x)
        assert MASK[name](x, everything).all()
    assert torch.equal(SOFT[name](x[:, :1], 1), x[:, :1])


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_constant_rows(name: str, value: float) -> None:
    x = torch.full((2, 50), value, requires_grad=True)
    result = SOFT[name](x, 5)
    assert float(result.detach().abs().max()) <= 1e-6 * abs(value)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert MASK[name](x, 5).all()


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_never_sparse(name: str, value: float) -> None:
    x = rows(5, 2, 30)
    x[0, 7] = value
    result = SOFT[name](x, 4)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()
    mask = MASK[name](x, 4)
    assert mask[0].all()
    assert torch.equal(mask[1], MASK[name](x[1], 4))
    hidden = torch.ones_like(x, dtype=torch.bool)
    hidden[0, 7] = False
    # what is not visible may be anything
    assert torch.equal(MASK[name](x, 4, visible=hidden)[0, :7], MASK[name](x[:1, [*range(7), *range(8, 30)]], 4)[0, :7])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n_key=st.integers(1, 60), k=st.integers(1, 70), name=st.sampled_from(sorted(MASK)))
def test_masks_see_visible_entries_only(seed: int, n_key: int, k: int, name: str) -> None:
    generator = np.random.default_rng(seed)
    x = torch.from_numpy(generator.normal(size=(3, 4, n_key)))
    visible = torch.from_numpy(generator.random((3, 1, n_key)) < generator.random())
    mask = MASK[name](x, k, visible=visible)
    for batch in range(3):
        columns = visible[batch, 0].numpy()
        for row in range(4):
            expected = np.zeros(n_key, dtype=bool)
            if columns.any():
                expected[columns] = numpy_topk.kept(x[batch, row].numpy()[columns], k, name)
            np.testing.assert_array_equal(mask[batch, row].numpy(), expected)


@pytest.mark.parametrize("name", MASK)
def test_every_row_keeps_its_largest_entry(name: str) -> None:
    x = torch.zeros(1, 100)
    x[0, :50] = 1.0  # two values: the threshold for k = 1 lies above both
    mask = MASK[name](x, 1)
    assert mask[0, :50].all()
    assert not mask[0, 50:].any()


@pytest.mark.parametrize("share", [0.02, 0.08, 0.32])
def test_the_count_for_gaussian_input_is_as_theory_says(share: float) -> None:
    """The mean count is k, and its variance is below the binomial one, by what mean and std take up.

    With z = Φ⁻¹(1 − p), the indicator 1(x > θ) less its projections on x and on (x² − 1)/√2, the influence of the
    estimated mean and std, has the variance p(1 − p) − φ(z)²(1 + z²/2): that times d is the variance of the count to
    first order. The mean is off by O(1), so for d = 4096 both are seen to within their sampling error.
    """
    d, n = 4096, 4000
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    counts = (statistical_topk(x, share) > 0).sum(-1).double().numpy()
    z = float(norm.ppf(1 - share))
    density = exp(-(z**2) / 2) / sqrt(2 * pi)
    variance = d * (share * (1 - share) - density**2 * (1 + z**2 / 2))
    assert variance < 0.8 * d * share * (1 - share)
    assert abs(counts.mean() - share * d) < 1.5 + 4 * sqrt(variance / n)
    low, high = chi2.ppf([1e-4, 1 - 1e-4], n - 1) / (n - 1)
    assert low * 0.97 < counts.var(ddof=1) / variance < high * 1.03


def test_the_error_in_the_count_grows_with_the_root_of_d() -> None:
    generator = torch.Generator().manual_seed(1)
    deviations = []
    for d in (256, 1024, 4096):
        x = torch.randn(2000, d, generator=generator)
        counts = (statistical_topk(x, 0.08) > 0).sum(-1).double()
        deviations.append(float((counts - 0.08 * d).square().mean().sqrt()) / sqrt(d))
    np.testing.assert_allclose(deviations, deviations[-1], rtol=0.1)


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k is 0; as a count it must be 1 to 8"),
        (-1, "k is -1; as a count it must be 1 to 8"),
        (9, "k is 9; as a count it must be 1 to 8"),
        (0.0, "k is 0.0; a float is a share and must be in (0, 1]"),
        (1.5, "k is 1.5; a float is a share"),
        (float("nan"), "k is nan; a float is a share"),
        (True, "k is True; give a count (int) or a share"),
        ("3", "k is '3'; give a count"),
    ],
)
def test_k_out_of_range_is_one_line(name: str, k: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        SOFT[name](torch.zeros(2, 8), k)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_other_bad_input_is_one_line() -> None:
    for call, message in (
        (lambda: statistical_topk(torch.zeros(3, dtype=torch.long), 1), "x must have a float dtype, got torch.int64"),
        (lambda: statistical_topk(torch.zeros(3), 1, dim=1), "dim is 1, but x has the shape [3]"),
        (lambda: exact_topk(torch.zeros(2, 0), 1), "x has no entries along dim -1"),
        (
            lambda: statistical_topk_mask(torch.zeros(2, 3), 1, visible=torch.ones(2, 3)),
            "visible must be a bool mask broadcastable to [2, 3], got torch.float32 [2, 3]",
        ),
        (
            lambda: exact_topk_mask(torch.zeros(2, 3), 1, visible=torch.ones(2, 4, dtype=torch.bool)),
            "visible must be a bool mask broadcastable to [2, 3], got torch.bool [2, 4]",
        ),
        (lambda: exact_topk_mask(torch.zeros(2, 3), 0), "k is 0; as a count it must be at least 1"),
    ):
        with pytest.raises(InputError) as raised:
            call()
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize("name", SOFT)
def test_it_compiles_as_one_graph(name: str) -> None:
    x, visible = rows(6, 4, 32), torch.rand(4, 32) < 0.7
    soft = torch.compile(lambda x: SOFT[name](x, 3), backend="aot_eager", fullgraph=True)
    mask = torch.compile(lambda x, v: MASK[name](x, 3, visible=v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(soft(x), SOFT[name](x, 3))
    assert torch.equal(mask(x, visible), MASK[name](x, 3, visible=visible))
