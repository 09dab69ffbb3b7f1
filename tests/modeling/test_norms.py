"""Every norm against its formula in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normfree import NormfreeConfig
from normfree.modeling.norms import NORMS, build_final_norm, build_norm

from . import reference

KNOWN = ("none", "layernorm", "rmsnorm")


def config(name: str, eps: float = 1e-5) -> NormfreeConfig:
    return NormfreeConfig(n_embd=12, n_head=1, n_layer=2, norm=name, final_norm=name, norm_eps=eps)


def test_every_norm_has_a_reference() -> None:
    assert set(NORMS) == {*KNOWN, "constant_std"}  # the last one: tests/removal/test_fold.py


@pytest.mark.parametrize("name", KNOWN)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([-10.0, 0.0, 3.0]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-1]),
)
def test_values(name: str, seed: int, scale: float, shift: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(2, 3, 12, generator=generator, dtype=torch.float64) + shift
    for module in (build_norm(config(name, eps), layer=1), build_final_norm(config(name, eps))):
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            actual = module(x).numpy()
        weights = {f"norm.{key}": value for key, value in reference.weights_of(module).items()}
        expected = reference.norm(name, weights, "norm", eps, x.numpy())
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "parameters"), [("none", []), ("layernorm", [1, 0]), ("rmsnorm", [1])])
def test_gains_start_at_one_and_biases_at_zero(name: str, parameters: list[float]) -> None:
    module = build_norm(config(name), layer=0)
    assert [set(each.tolist()) for each in module.parameters()] == [{value} for value in parameters]
