"""A norm on its way out against NumPy: the stds it keeps, whom they divide, and the norm it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from normfree.errors import InputError
from normfree.removal.removable import RemovableNorm, SpecialTokens

from .std_statistics import statistic_of

WIDTH = 8


def norm_of(kind: str) -> torch.nn.LayerNorm | torch.nn.RMSNorm:
    generator = torch.Generator().manual_seed(0)
    norm = (torch.nn.LayerNorm if kind == "layernorm" else torch.nn.RMSNorm)(WIDTH, eps=1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return norm


def removable(kind: str, *, momentum: float = 0.5, end_of_text: list[int] | None = None) -> RemovableNorm:
    return RemovableNorm(norm_of(kind), n_reader=2, momentum=momentum, tokens=SpecialTokens(end_of_text))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 1 + 3 * torch.randn(4, 6, WIDTH, generator=generator)
    x[:, 0] *= 50
    return x, torch.randint(3, (4, 6), generator=generator)


def stds(kind: str, x: torch.Tensor) -> np.ndarray:
    values = x.double().numpy()
    centered = values - values.mean(-1, keepdims=True) if kind == "layernorm" else values
    return np.sqrt((centered**2).mean(-1) + 1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_it_is_the_norm_it_was(kind: str) -> None:
    x, ids = batch(0)
    module = removable(kind)
    module.tokens.see(ids)
    for reading in module(x):
        torch.testing.assert_close(reading, norm_of(kind)(x))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_constant_readers_divide_by_the_running_mean_of_both_kinds_of_tokens(kind: str) -> None:
    module = removable(kind, end_of_text=[2])
    kept = {"ordinary": np.nan, "special": np.nan}
    for seed in range(3):
        x, ids = batch(seed)
        special = (ids == 2).numpy()
        special[:, 0] = True
        for name, mask in (("ordinary", ~special), ("special", special)):
            mean = stds(kind, x)[mask].mean()
            kept[name] = mean if seed == 0 else 0.5 * kept[name] + 0.5 * mean
        module.tokens.see(ids)
        module(x)
        if seed == 1:
            module.make_constant(0)
            frozen = dict(kept)
    np.testing.assert_allclose(module.std.numpy(), [frozen["ordinary"], kept["ordinary"]], rtol=1e-5)
    np.testing.assert_allclose(module.special_std.numpy(), [frozen["special"], kept["special"]], rtol=1e-5)

    module.eval()
    first, second = module(x)
    torch.testing.assert_close(second, norm_of(kind)(x))
    centered = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    divisor = torch.from_numpy(np.where(special, frozen["special"], frozen["ordinary"]))[..., None].float()
    bias = module.bias if module.bias is not None else 0.0
    torch.testing.assert_close(first, centered / divisor * module.weight + bias)

    module.tokens.shares = dict.fromkeys(module.tokens.shares, 0.0)
    module.tokens.see(ids)
    uniform, _ = module(x)
    torch.testing.assert_close(uniform, centered / torch.tensor(frozen["ordinary"]).float() * module.weight + bias)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_published_special_tokens_are_end_of_text_for_the_values_only(kind: str) -> None:
    """Queries and keys divide by the mean over all tokens; values divide end-of-text by its own."""
    module = removable(kind, momentum=0.9, end_of_text=[2])
    module.tokens = SpecialTokens([2], "published")
    mean = end_of_text = np.nan
    for seed in range(3):
        x, ids = batch(seed)
        is_end = (ids == 2).numpy()
        own = stds(kind, x)
        mean = own.mean() if seed == 0 else 0.9 * mean + 0.1 * own.mean()
        end_of_text = own[is_end].mean() if seed == 0 else 0.9 * end_of_text + 0.1 * own[is_end].mean()
        module.tokens.see(ids)
        module(x)
    module.make_constant(0)
    module.make_constant(1)
    module.eval()
    centered = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    bias = module.bias if module.bias is not None else 0.0
    all_alike = torch.full(ids.shape, mean)
    divisors = (all_alike, torch.where(ids == 2, torch.tensor(end_of_text), all_alike))
    for reading, divisor in zip(module(x), divisors, strict=True):
        torch.testing.assert_close(reading, centered / divisor[..., None].float() * module.weight + bias)

    module.tokens.shares["end_of_text"] = 0.0
    module.tokens.see(ids)
    for reading in module(x):
        torch.testing.assert_close(reading, centered / all_alike[..., None].float() * module.weight + bias)


def test_stds_move_in_training_only_and_get_no_gradient() -> None:
    module = removable("layernorm")
    x, ids = batch(0)
    module.tokens.see(ids)
    module.eval()(x)
    with torch.no_grad():
        module.train()(x)
    assert module.std.isnan().all()
    with pytest.raises(InputError, match="no batch has been seen yet"):
        module.make_constant(0)
    module(x)
    module.make_constant(0)
    with pytest.raises(InputError, match="removed twice"):
        module.make_constant(0)
    assert not module.std.requires_grad


def test_the_gradient_of_a_constant_reader_is_that_of_a_linear_map() -> None:
    module = removable("layernorm").double()
    x, ids = batch(0)
    module.tokens.see(ids)
    module(x)
    module.make_constant(0)
    module.eval()
    x = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0][1, 2, 3], x)
    (again,) = torch.autograd.grad(module(7 * x.detach().requires_grad_())[0].sum() * 0 + module(x * 2)[0][1, 2, 3], x)
    torch.testing.assert_close(again, 2 * gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("statistic", ["mean", "median", 0.9])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_measured_tokens_are_special_wherever_they_are(kind: str, statistic: Any) -> None:
    """Two massive tokens at the beginning of a sequence, one within another, none in a third.

    What exceeds 8 times the constant, even a whole sequence, is divided by its own std, and from its stage on by
    a share of it, or the constant if that is more.
    """
    tokens = SpecialTokens([2], "measured", factor=8.0)
    module = RemovableNorm(norm_of(kind), n_reader=2, momentum=0.5, tokens=tokens, statistic=statistic)
    constant = np.nan
    for seed in range(3):
        x, ids = batch(seed)
        x[:, 0] /= 50
        x[0, :2] *= 300
        x[1, 3] *= 100
        tokens.see(ids)
        module(x)
        s = stds(kind, x)
        is_massive = s > 8 * np.median(s, axis=1, keepdims=True)
        assert is_massive.nonzero()[0].tolist() == [0, 0, 1]
        now = statistic_of(s[~is_massive], statistic)
        constant = now if seed == 0 else 0.5 * constant + 0.5 * now
    np.testing.assert_allclose(module.std.numpy(), [constant] * 2, rtol=1e-5)
    assert module.special_std.isnan().all()
    for reader in (0, 1):
        module.make_constant(reader)
    x[3] *= 100
    s = stds(kind, x)
    too_long = s > 8 * constant
    assert too_long[3, 1:].all(), "a whole sequence, none of which is massive in it"
    centered = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    bias = module.bias if module.bias is not None else 0.0
    relative = s[too_long] / constant
    for share in (1.0, 0.25, 2 / (relative.min() + relative.max())):
        tokens.shares["massive_tokens"] = share
        divisor = np.where(too_long, np.maximum(constant, share * s), constant)
        assert (divisor[too_long] > constant).any()
        for reading in module(x):
            expected = centered / torch.from_numpy(divisor)[..., None].float() * module.weight + bias
            torch.testing.assert_close(reading, expected)
    assert (divisor[too_long] == constant).any(), "the last share leaves the less massive ones to the constant"
    tokens.shares["massive_tokens"] = 0.0
    for reading in module(x):
        torch.testing.assert_close(reading, centered / float(constant) * module.weight + bias)


@pytest.mark.parametrize("ramp", [0.2, 0.75])
def test_a_ramp_is_geometric(ramp: float) -> None:
    module = removable("rmsnorm").double()
    x, ids = batch(0)
    x = x.double()
    module.tokens.see(ids)
    module(x)
    module.make_constant(1)
    module.eval()
    own = stds("rmsnorm", x)
    divisor = np.where(np.arange(6) == 0, module.special_std[1].item(), module.std[1].item())
    module.ramp[1] = ramp
    other, reading = module(x)
    expected = x.numpy() / (own ** (1 - ramp) * divisor**ramp)[..., None] * module.weight.detach().numpy()
    np.testing.assert_allclose(reading.detach().numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(other, norm_of("rmsnorm").double()(x))
