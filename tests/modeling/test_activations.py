"""Every activation against its formula in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.activations import ACTIVATIONS, LEAKY_ACTIVATIONS, LearnableLeakyReLU, build_activation

from . import reference


def build(name: str, slope: float = 0.01) -> torch.nn.Module:
    options: dict[str, Any] = {"negative_slope": slope} if name in LEAKY_ACTIVATIONS else {}
    return build_activation(NormfreeConfig(activation=name, **options), layer=0)


def test_every_activation_has_a_reference() -> None:
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@given(
    values=st.lists(st.floats(-40, 40), min_size=1, max_size=20),
    slope=st.floats(-0.5, 1.5),
)
def test_values(name: str, values: list[float], slope: float) -> None:
    x = np.array(values)
    expected = reference.ACTIVATIONS[name](x, slope)
    with torch.no_grad():
        actual = build(name, slope).double()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_gradient_by_central_differences(name: str) -> None:
    points = np.array([-3.1, -1.2, -0.4, 0.3, 0.9, 2.7])
    x = torch.tensor(points, requires_grad=True)
    (gradient,) = torch.autograd.grad(build(name, 0.25).double()(x).sum(), x)
    above, below = (reference.ACTIVATIONS[name](points + step, 0.25) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(gradient.numpy(), (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_nan_is_passed_on(name: str) -> None:
    assert build(name)(torch.tensor([torch.nan])).isnan().all()


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_gradient_of_the_learnable_slope_is_the_sum_of_the_negative_inputs(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    activation = LearnableLeakyReLU(0.1)
    (gradient,) = torch.autograd.grad(activation(x).sum(), activation.negative_slope)
    assert activation.negative_slope.shape == (1,)
    expected = np.minimum(np.array(values), 0).sum()
    np.testing.assert_allclose(gradient.item(), expected, rtol=1e-6, atol=1e-12)


def test_one_activation_per_layer() -> None:
    names = ["gelu", "relu", "learnable_leaky_relu", "leaky_relu"]
    config = NormfreeConfig(
        vocab_size=8,
        n_positions=4,
        n_embd=4,
        n_head=1,
        n_layer=4,
        activation=names,
        negative_slope=0.3,
    )
    model = NormfreeForCausalLM(config)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for block, name in zip(model.model.blocks, names, strict=True):
        actual = block.ffn.activation.double()(x).detach().numpy()
        np.testing.assert_allclose(actual, reference.ACTIVATIONS[name](x.numpy(), 0.3), rtol=1e-6, atol=1e-12)


def test_a_slope_may_be_a_whole_number() -> None:
    activation = build_activation(NormfreeConfig(activation="learnable_leaky_relu", negative_slope=0), 0)
    assert activation(torch.tensor([-2.0, 3.0])).tolist() == [0.0, 3.0]
