"""The auxiliary losses of a removal against NumPy in float64, from the residual stream before each norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from normfree import from_hf
from normfree.removal.midway import Midway
from normfree.removal.schedule import Removal
from normfree.removal.std_losses import LARGEST_RATIO, MASSIVE_LOSS, STD_LOSS, StdLosses, random_sequences

from .models import scheduled, stock, tokens
from .std_statistics import statistic_of


def losses(name: str, **options: Any) -> tuple[StdLosses, dict[str, NDArray[np.float64]]]:
    """The objective after a forward pass with a massive token in each sequence, and the stds before each norm."""
    midway = Midway(from_hf(stock(name)).double(), scheduled(**options))
    with torch.no_grad():
        midway.model.model.embed_tokens.weight[7] *= 300
    objective = StdLosses(midway)
    ids = tokens()
    ids[:, 5] = 7
    streams: dict[str, torch.Tensor] = {}
    for each, norm in midway.norms():
        norm.register_forward_pre_hook(lambda _, inputs, each=each: streams.__setitem__(each, inputs[0].detach()))
    midway.model.train().requires_grad_()
    for module in midway.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    midway.model(ids)
    centred = name != "llama"
    stds = {}
    for (each, norm), x in zip(midway.norms(), streams.values(), strict=True):
        values = x.numpy()
        values = values - values.mean(-1, keepdims=True) if centred else values
        stds[each] = np.sqrt((values**2).mean(-1) + norm.eps)
    return objective, stds


@pytest.mark.parametrize("statistic", ["mean", "median", 0.25])
@pytest.mark.parametrize("norms", ["final", "all"])
def test_log_ratios_to_the_statistic_of_ordinary_tokens(statistic: Any, norms: str) -> None:
    options = {"std_loss": "log_ratio", "std_loss_norms": norms, "std_loss_weight": 0.5, "std_statistic": statistic}
    objective, stds = losses("llama", **options, special_tokens="measured", special_factor=4.0, stages=MEASURED)
    expected = []
    for name, s in stds.items():
        ordinary = s <= 4 * np.median(s, axis=1, keepdims=True)
        assert not ordinary.all(), "the massive token is apart"
        if norms == "all" or name.endswith("final_norm"):
            expected.append((np.log(s / statistic_of(s[ordinary], statistic)) ** 2).mean())
    term = objective.terms(None, None)[STD_LOSS]
    np.testing.assert_allclose(term.value.item(), np.mean(expected), rtol=1e-9)
    term.value.backward()
    assert objective.midway.model.model.blocks[0].ffn.down_proj.weight.grad.abs().sum() > 0


MEASURED = [
    {"part": "ffn", "after": 1},
    {"part": "attention_qk", "after": 1},
    {"part": "attention_v", "after": 1},
    {"part": "final", "after": 1},
    {"part": "massive_tokens", "after": 1},
]


def test_log_ratios_do_not_depend_on_scale_and_squares_do() -> None:
    """Streams 3 times as large, up to the ε in the stds."""
    for kind, factor in (("log_ratio", 1.0), ("squared", 9.0)):
        objective, _ = losses("llama", std_loss=kind, std_loss_norms="all", std_loss_weight=1.0)
        before = objective.terms(None, None)[STD_LOSS].value.item()
        for norm in objective.norms:
            assert norm.own_std is not None
            norm.own_std = 3 * norm.own_std
        assert objective.terms(None, None)[STD_LOSS].value.item() == pytest.approx(factor * before, rel=1e-9)


def test_what_is_gone_is_drawn_to_its_constant() -> None:
    options = {"std_loss": "log_ratio", "std_loss_norms": "all", "std_loss_weight": 1.0}
    objective, stds = losses("gpt2", **options)
    midway = objective.midway
    midway.apply(Removal(0, "attention_v", 1))
    norm = midway.model.model.blocks[1].attention_norm
    norm.std[1] = 7.0
    ordinary = np.ones((3, 17), bool)
    ordinary[:, 0] = False
    ordinary &= tokens().numpy() != 2
    ordinary[:, 5] = True
    expected = [
        (np.log(s / (7.0 if "1.attention" in name else s[ordinary].mean())) ** 2).mean() for name, s in stds.items()
    ]
    np.testing.assert_allclose(objective.terms(None, None)[STD_LOSS].value.item(), np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_massive_tokens_cost_their_squared_log_ratio(factor: float) -> None:
    objective, stds = losses("gpt_neox", massive_weight=0.25, special_factor=factor)
    per_norm, largest = [], np.zeros(3)
    for s in stds.values():
        ratio = s / np.median(s, axis=1, keepdims=True)
        per_norm.append((np.log(ratio) ** 2 * (ratio > factor)).sum(axis=1).mean())
        largest = np.maximum(largest, ratio.max(axis=1))
    terms = objective.terms(None, None)
    assert np.mean(per_norm) > 0
    np.testing.assert_allclose(terms[MASSIVE_LOSS].value.item(), np.mean(per_norm), rtol=1e-9)
    np.testing.assert_allclose(terms[LARGEST_RATIO].value.item(), largest.mean(), rtol=1e-9)
    assert (terms[MASSIVE_LOSS].weight, terms[LARGEST_RATIO].weight) == (0.25, 0.0)
    assert not terms[LARGEST_RATIO].value.requires_grad
    assert STD_LOSS not in terms
    terms[MASSIVE_LOSS].value.backward()
    grad = objective.midway.model.model.embed_tokens.weight.grad
    assert grad[7].abs().sum() > 0


def test_no_massive_token_costs_nothing() -> None:
    objective, _ = losses("llama", massive_weight=1.0, special_factor=1e9)
    assert objective.terms(None, None)[MASSIVE_LOSS].value.item() == 0


def test_the_weight_of_the_std_loss_rises() -> None:
    objective, _ = losses("gpt2", std_loss_weight=0.8, std_loss_ramp_steps=4)
    weights = []
    for step in range(6):
        objective.midway.begin_step(step)
        weights.append(objective.terms(None, None)[STD_LOSS].weight)
    np.testing.assert_allclose(weights, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


RANDOM = {"std_loss": "log_ratio", "std_loss_norms": "all", "std_loss_weight": 1.0, "massive_weight": 0.5}


def test_random_tokens_add_losses_of_their_own_and_move_no_constant() -> None:
    objective, _ = losses("llama", **RANDOM, random_sequences=2)
    plain, _ = losses("llama", **RANDOM)
    midway = objective.midway
    before = {name: (norm.std.clone(), norm.largest) for name, norm in midway.norms()}
    seen: list[torch.Size] = []
    midway.model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args), with_kwargs=True)
    found, expected = objective.terms(None, None), plain.terms(None, None)
    assert seen == [], "no probe sees them"
    for name, term in expected.items():
        torch.testing.assert_close(found[name].value, term.value)
    assert found.keys() - expected.keys() == {f"random_{STD_LOSS}", f"random_{MASSIVE_LOSS}"}
    for name, norm in midway.norms():
        std, largest = before[name]
        torch.testing.assert_close(norm.std, std, equal_nan=True)
        assert norm.largest is largest
        assert not norm.is_aside
    random = found[f"random_{STD_LOSS}"]
    assert random.weight == 1.0
    random.value.backward()
    weight = midway.model.model.blocks[0].ffn.down_proj.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0, "the weights are those that train"


def test_random_sequences_repeat_a_pattern_of_the_text_or_of_any_tokens() -> None:
    text = torch.arange(2 * 48).view(2, 48) + 1000
    drawn = torch.cat([random_sequences(2, text, 100, seed=seed) for seed in range(60)])
    assert drawn.shape == (120, 48)
    assert drawn.dtype == torch.int64
    periods = []
    for row in drawn.tolist():
        period = next(p for p in range(1, 49) if all(row[t] == row[t - p] for t in range(p, 48)))
        pattern = row[:period]
        assert max(pattern) < 100 or pattern == list(range(pattern[0], pattern[0] + period))
        periods.append(period)
    from_text = [row[0] >= 1000 for row in drawn.tolist()]
    assert sum(from_text) == 60
    assert {*from_text[::4]} == {False}
    assert 0.3 < np.mean([period < 48**0.5 for period in periods]) < 0.7, "half of the lengths are below the root of T"
    assert {1} < {*periods}
    assert torch.equal(random_sequences(2, text, 100, seed=59), drawn[-2:])


def test_random_tokens_are_those_of_the_step() -> None:
    objective, _ = losses("llama", **RANDOM, random_sequences=1)
    value = []
    for step in (2, 6, 2):
        objective.midway.begin_step(step)
        value.append(objective.terms(None, None)[f"random_{STD_LOSS}"].value.item())
    assert value[0] == value[2] != value[1]


def test_what_overflows_on_random_tokens_is_left_out() -> None:
    objective, _ = losses("llama", **RANDOM, random_sequences=1)
    with torch.no_grad():
        objective.midway.model.model.embed_tokens.weight.mul_(torch.inf)
    assert not {name for name in objective.terms(None, None) if name.startswith("random_")}
    assert objective.midway.overflow() is None
