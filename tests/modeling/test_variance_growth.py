"""Growth of the residual stream's variance with depth at the start of training, against closed forms.

One token attends to itself alone, so attention is W_O W_V. With weights N(0, s²), no biases, width d and an inner width
m of ReLUs, a sublayer that reads numbers of mean square 1 writes numbers whose expected square is

    attention: (s² d)²        feed-forward network: (s² d / 2) (s² m)

whatever the depth: the stream's mean square grows by their sum c in every layer of a Pre-Norm model. LayerNorm Scaling
divides what layer l reads by sqrt(l); both sublayers are homogeneous, so there it grows by c / l.

A token's sum over layers scatters by sqrt(2 / d) = 10 % of itself: the inner products of the stream with what layers
write do not vanish. The tests average 200 tokens of 4 runs; if the tokens of a run scattered all alike, 5 % would be
left. They allow 10 %.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM

from .reference import Array

N_LAYER, WIDTH, INNER, STD = 24, 192, 384, 0.08
PER_LAYER = (STD**2 * WIDTH) ** 2 + STD**2 * WIDTH / 2 * STD**2 * INNER


def mean_squares(**options: Any) -> Array:
    """The mean square of the residual stream after 0, ..., n_layer - 1 blocks, over 200 sequences of one token."""
    sizes: dict[str, Any] = {"vocab_size": 200, "n_positions": 1, "n_layer": N_LAYER + 1, "n_head": 2, "n_embd": WIDTH}
    plain: dict[str, Any] = {
        "n_inner": INNER,
        "activation": "relu",
        "attention_bias": "none",
        "mlp_bias": False,
        "final_norm": "none",
    }
    config = NormfreeConfig(**{**sizes, **plain, "initializer_range": STD, **options})
    model = NormfreeForCausalLM(config).eval()
    with torch.no_grad():
        stream = model(torch.arange(200)[:, None], output_hidden_states=True).hidden_states[:-1]
    return np.array([each.double().square().mean().item() for each in stream])


def average_mean_squares(**options: Any) -> Array:
    runs = []
    for seed in range(4):
        torch.manual_seed(seed)
        runs.append(mean_squares(**options))
    return np.mean(runs, axis=0)


def r_squared(x: Array, y: Array) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_pre_norm_grows_linearly(norm: str) -> None:
    measured = average_mean_squares(norm=norm)
    layers = np.arange(N_LAYER + 1, dtype=np.float64)
    np.testing.assert_allclose(measured, measured[0] + PER_LAYER * layers, rtol=0.1)
    assert r_squared(layers, measured) > 0.995


@pytest.mark.parametrize("norm", ["rmsnorm_scaling", "layernorm_scaling"])
def test_layernorm_scaling_grows_like_the_harmonic_numbers(norm: str) -> None:
    measured = average_mean_squares(norm=norm)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, N_LAYER + 1))])
    np.testing.assert_allclose(measured, measured[0] + PER_LAYER * harmonic, rtol=0.1)
    assert r_squared(harmonic, measured) > 0.995
    assert r_squared(np.arange(N_LAYER + 1, dtype=np.float64), measured) < 0.85


def test_sandwich_grows_by_two_in_every_layer() -> None:
    """What a sublayer writes has mean square 1, whatever its weights."""
    measured = average_mean_squares(norm="rmsnorm", norm_placement="sandwich")
    np.testing.assert_allclose(measured, measured[0] + 2 * np.arange(N_LAYER + 1), rtol=0.1)


@pytest.mark.parametrize("placement", ["post", "deepnorm"])
def test_post_norms_do_not_grow(placement: str) -> None:
    np.testing.assert_allclose(mean_squares(norm="rmsnorm", norm_placement=placement)[1:], 1, rtol=1e-3)


def test_mix_grows_only_where_it_is_pre() -> None:
    measured = average_mean_squares(norm="rmsnorm", norm_placement="mix", n_post_layer=10)
    np.testing.assert_allclose(measured[1:11], 1, rtol=1e-3)
    np.testing.assert_allclose(measured[10:], 1 + PER_LAYER * np.arange(N_LAYER - 9), rtol=0.1)


def test_hybrid_norm_starts_each_block_from_what_one_ffn_adds_to_a_normalized_stream() -> None:
    """The stream is Norm(h) + FFN(Norm(h)): mean square 1 and what the feed-forward network adds, in all layers."""
    measured = average_mean_squares(norm="rmsnorm", norm_placement="hybrid")
    ffn = STD**2 * WIDTH / 2 * STD**2 * INNER
    np.testing.assert_allclose(measured[1:], 1 + ffn, rtol=0.1)


def all_aligned(norm: str, n_layer: int, start: float, step: float) -> Array:
    """Mean squares of the stream where every layer writes in one direction: the worst case of the triangle inequality.

    The embedding is start · u with u = (1, -1, 1, -1, ...); each feed-forward network has one neuron, which reads u's
    coefficient in the normalized stream, and writes it step times as large along u; attention writes nothing.
    """
    config = NormfreeConfig(
        vocab_size=1,
        n_positions=1,
        n_layer=n_layer + 1,
        n_head=1,
        n_embd=8,
        n_inner=1,
        activation="relu",
        norm=norm,
        final_norm="none",
        norm_eps=1e-12,
    )
    model = NormfreeForCausalLM(config).double().eval()
    u = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_positions.weight.zero_()
        model.model.embed_tokens.weight.copy_(start * u[None])
        for block in model.model.blocks:
            block.attention.o_proj.weight.zero_()
            block.ffn.up_proj.weight.copy_(u[None] / 8)
            block.ffn.down_proj.weight.copy_(step * u[:, None])
        stream = model(torch.zeros(1, 1, dtype=torch.int64), output_hidden_states=True).hidden_states[:-1]
    return np.array([each.square().mean().item() for each in stream])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_variance_is_bounded_by_a_polynomial_of_depth_and_a_lower_one_with_scaling(kind: str) -> None:
    """Lemma 4.1 of "The Curse of Depth" bounds the variance under LayerNorm Scaling by Θ(L^(2 - ε)), 1/2 ≤ ε < 1.

    By the triangle inequality the root mean square of the stream grows by at most C in a Pre-Norm layer, and by at most
    C / sqrt(l) with scaling, C the largest gain of a sublayer: the variance is at most (σ₀ + C L)² and
    (σ₀ + C Σ 1/sqrt(l))² ≤ (σ₀ + 2 C sqrt(L))². Layers that all write in one direction reach both bounds.
    """
    n_layer, start, step = 200, 0.5, 2.0
    layers = np.arange(n_layer + 1)
    plain = all_aligned(kind, n_layer, start, step)
    scaled = all_aligned(f"{kind}_scaling", n_layer, start, step)
    roots = np.concatenate([[0.0], np.cumsum(np.arange(1, n_layer + 1) ** -0.5)])
    np.testing.assert_allclose(plain, (start + step * layers) ** 2, rtol=1e-9)
    np.testing.assert_allclose(scaled, (start + step * roots) ** 2, rtol=1e-9)
    assert (scaled <= (start + 2 * step * np.sqrt(layers)) ** 2 * (1 + 1e-9)).all()

    def growth(mean_square: Array) -> float:
        return float(np.log(mean_square[200] / mean_square[50]) / np.log(4))

    assert growth(plain) == pytest.approx(2, abs=0.02)
    assert 1.0 <= growth(scaled) <= 2 - 1 / 2
