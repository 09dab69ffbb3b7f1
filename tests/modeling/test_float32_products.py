"""Float32 products by oneDNN against float64, forward and backward, and what keeps torch's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from normfree.modeling import float32_products as module
from normfree.modeling.float32_products import FastProducts


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was multiplied by oneDNN, on a machine where it is said to be the faster."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    found: list[tuple[int, ...]] = []
    plain = module._product

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append((*x.shape, *weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(module, "_product", seen)
    return found


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("build", [nn.Linear, lambda n_in, n_out: Conv1D(n_out, n_in)])
@pytest.mark.parametrize("shape", [(9, 7), (3, 5, 7), (2, 3, 4, 7)])
def test_products_and_gradients_are_those_of_float64(
    products: list[tuple[int, ...]], build: Callable[[int, int], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, wide = build(7, 11), build(7, 11)
    with torch.no_grad():
        for each in layer.parameters():
            each.normal_()
    wide.load_state_dict(layer.state_dict())
    wide.double()
    x = torch.randn(shape, requires_grad=True)
    x_wide = x.detach().double().requires_grad_()
    with FastProducts():
        y = layer(x)
    expected = wide(x_wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    expected.backward(gradient.double())
    assert len(products) == 3
    assert distance(x.grad, x_wide.grad) < 1e-6
    assert all(map(lambda *pair: distance(pair[0].grad, pair[1].grad) < 1e-6, layer.parameters(), wide.parameters()))


def test_a_strided_input_and_no_bias(products: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 6)
    x = torch.randn(8, 4, 12)[:, 1:, ::2]
    with FastProducts():
        found = nn.functional.linear(x, weight)
    assert products
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_what_is_left_to_torch(products: list[tuple[int, ...]]) -> None:
    """Few rows, other dtypes, autocast, subclasses, keywords, and everything outside."""
    layer, x = nn.Linear(6, 4), torch.randn(9, 6)
    layer(x)
    with FastProducts():
        layer(x[:7])
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        nn.functional.linear(x, weight=layer.weight)
        nn.functional.linear(x[:0], layer.weight)
        torch.addmm(torch.randn(9, 4), x, layer.weight.T)
    assert not products


def test_a_whole_model_is_the_same_to_rounding(products: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=8)).eval()
    tokens = torch.randint(0, 50, (2, 16))
    expected = model(tokens, labels=tokens)
    gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    with FastProducts():
        found = model(tokens, labels=tokens)
        fast = torch.autograd.grad(found.loss, list(model.parameters()))
    assert len(products) > 20
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-6)
    for each, gradient in zip(fast, gradients, strict=True):
        torch.testing.assert_close(each, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False)],
)
def test_where_onednn_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert module.onednn_is_faster.__wrapped__() is expected
