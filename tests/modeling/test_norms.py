"""Every norm against its formula in float64 NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.norms import NORMS, build_final_norm, build_norm
from normfree.modeling.qk_norms import build_head_norm

from . import reference

KNOWN = ("none", "layernorm", "rmsnorm", "layernorm_scaling", "rmsnorm_scaling", "dyt", "derf")


def config(name: str, eps: float = 1e-5, **options: Any) -> NormfreeConfig:
    final_norm = name.removesuffix("_scaling")
    return NormfreeConfig(n_embd=12, n_head=1, n_layer=5, norm=name, final_norm=final_norm, norm_eps=eps, **options)


def test_every_norm_has_a_reference() -> None:
    assert set(NORMS) == {*KNOWN, "constant_std"}  # the last one: tests/removal/test_fold.py


@pytest.mark.parametrize("name", KNOWN)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([-10.0, 0.0, 3.0]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-1]),
    layer=st.integers(0, 4),
)
def test_values(name: str, seed: int, scale: float, shift: float, eps: float, layer: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(2, 3, 12, generator=generator, dtype=torch.float64) + shift
    of_block = build_norm(config(name, eps), layer, "ffn")
    for kind, module in ((name, of_block), (name.removesuffix("_scaling"), build_final_norm(config(name, eps)))):
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            actual = module(x).numpy()
        weights = {f"norm.{key}": value for key, value in reference.weights_of(module).items()}
        expected = reference.norm(kind, weights, "norm", eps, x.numpy(), layer)
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm_scaling"])
def test_half_precision_input_of_a_float32_norm_is_not_rounded_again(name: str, recwarn: Any) -> None:
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = build_norm(config(name), 3, "ffn")
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32
    expected = reference.norm(
        name,
        {f"norm.{key}": each for key, each in reference.weights_of(module).items()},
        "norm",
        1e-5,
        x.double().numpy(),
        3,
    )
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-6)
    assert module.bfloat16()(x).dtype == torch.bfloat16
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("none", []),
        ("layernorm", [1, 0]),
        ("rmsnorm", [1]),
        ("layernorm_scaling", [1, 0]),
        ("rmsnorm_scaling", [1]),
        ("dyt", [0.5, 1, 0]),
        ("derf", [0.5, 0, 1, 0]),
    ],
)
def test_gains_start_at_one_biases_at_zero_and_alpha_at_a_half(name: str, parameters: list[float]) -> None:
    module = build_norm(config(name), 0, "ffn")
    assert [set(each.tolist()) for each in module.parameters()] == [{value} for value in parameters]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_scaling_in_the_first_layer_is_the_plain_norm_and_a_half_in_the_fourth(norm: str) -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    plain = build_norm(config(norm), 0, "attention").double()
    first, fourth = (build_norm(config(f"{norm}_scaling"), layer, "attention").double() for layer in (0, 3))
    torch.testing.assert_close(first(x), plain(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(fourth(x), plain(x) / 2, rtol=1e-12, atol=0)


def test_scaling_has_the_gradients_of_the_scaled_output() -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    weight = torch.randn(3, 12, dtype=torch.float64)
    plain = build_norm(config("layernorm"), 0, "ffn").double()
    scaled = build_norm(config("layernorm_scaling"), 2, "ffn").double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    (weight * plain(inputs[0]) / np.sqrt(3)).sum().backward()
    (weight * scaled(inputs[1])).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "attention", "other"),
    [
        ({}, 0.5, 0.5),
        ({"dyt_alpha": 0.2}, 0.2, 0.2),
        ({"dyt_alpha": 0.2, "dyt_attention_alpha": 0.8}, 0.8, 0.2),
        ({"dyt_attention_alpha": 0.8}, 0.8, 0.5),
        ({"dyt_alpha": 1}, 1.0, 1.0),
    ],
)
def test_dyt_starts_at_the_configured_alphas(options: dict[str, float], attention: float, other: float) -> None:
    model = NormfreeForCausalLM(config("dyt", **options, vocab_size=19, n_positions=4))
    alphas = {name: parameter.item() for name, parameter in model.named_parameters() if name.endswith(".alpha")}
    assert len(alphas) == 11
    for name, alpha in alphas.items():
        assert alpha == pytest.approx(attention if ".attention_norm." in name else other), name


@pytest.mark.parametrize(
    ("options", "alpha", "shift"), [({}, 0.5, 0.0), ({"derf_alpha": 2, "derf_shift": -0.3}, 2.0, -0.3)]
)
def test_derf_starts_at_the_configured_alpha_and_shift(
    options: dict[str, float], alpha: float, shift: float, tmp_path: Path
) -> None:
    model = NormfreeForCausalLM(config("derf", **options, vocab_size=19, n_positions=4))
    numbers = {name: each for name, each in model.named_parameters() if name.endswith((".alpha", ".shift"))}
    assert len(numbers) == 22
    for name, each in numbers.items():
        assert each.shape == (1,), "sharded data parallelism takes no scalars"
        assert each.item() == pytest.approx(alpha if name.endswith("alpha") else shift), name
    with torch.no_grad():
        for each in numbers.values():
            each.add_(1)
    model.save_pretrained(tmp_path)
    loaded = dict(NormfreeForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], each) for name, each in numbers.items())


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_derf_has_the_gradients_of_its_equation(seed: int, scale: float) -> None:
    """d erf(z) / dz = 2/√π · exp(−z²), in float64 NumPy."""
    generator = torch.Generator().manual_seed(seed)
    module = build_norm(config("derf"), 0, "ffn").double()
    x = (scale * torch.randn(5, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    *of_parameters, of_x = torch.autograd.grad((module(x) * upstream).sum(), (*module.parameters(), x))
    values, g = x.detach().numpy(), upstream.numpy()
    alpha, shift, gain, _ = (each.detach().numpy() for each in module.parameters())
    z = alpha * values + shift
    slope = g * gain * 2 / np.sqrt(np.pi) * np.exp(-(z**2))
    expected = [(slope * values).sum()[None], slope.sum()[None], (g * erf(z)).sum(0), g.sum(0)]
    for gradient, each in zip(of_parameters, expected, strict=True):
        np.testing.assert_allclose(gradient.numpy(), each, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(of_x.numpy(), slope * alpha, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dyt", "derf"])
def test_pointwise_norms_bound_what_they_give_and_keep_the_sign(name: str) -> None:
    """|tanh| and |erf| are at most 1: whatever comes in, at most the gain comes out."""
    norm = build_norm(config(name), 0, "ffn")
    x = torch.tensor([[-1e30, -1.0, -1e-8, 0.0, 1e-8, 1.0, 1e30, 5.0, -5.0, 2.0, -2.0, 0.5]])
    y = norm(x)
    assert y.abs().max() <= 1
    assert torch.equal(y.sign(), x.sign())


@pytest.mark.parametrize("projection", ["q", "k", "v"])
def test_head_norms_are_as_wide_as_a_head(projection: str) -> None:
    hybrid = config("rmsnorm", norm_placement="hybrid", head_dim=7)
    assert [each.shape for each in build_head_norm(hybrid, 1, projection).parameters()] == [(7,)]
    qk = config("none", qk_norm="layernorm", head_dim=7)
    expected = [] if projection == "v" else [(7,), (7,)]
    assert [each.shape for each in build_head_norm(qk, 1, projection).parameters()] == expected
    assert not list(build_head_norm(config("layernorm"), 1, projection).parameters())
    heads = {"q": 4, "k": 2, "v": 0}[projection]
    for qk_norm in ("rmsnorm_full_width", "layernorm_per_head"):
        grouped = NormfreeConfig(n_embd=12, n_head=4, n_kv_head=2, head_dim=7, qk_norm=qk_norm)
        built = build_head_norm(grouped, 1, projection)
        assert [each.shape for each in built.parameters()] == ([] if projection == "v" else [(7 * heads,)])
