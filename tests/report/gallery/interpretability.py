"""What models with and without norms are to interpretability."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from normfree import plot

from .frames import HEADS, MODELS, grid, noise, number
from .registry import drawn_for


@drawn_for({"": MODELS, "_of_one_model": MODELS[:1]})
def attribution_errors(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer), head=range(HEADS[n_layer]))
    nmae = np.random.default_rng(0).uniform(0.02, 1.2, len(frame)) * (number(frame, "model") != 1)
    return plot.attribution_error_heatmaps(frame.assign(nmae=nmae))


@drawn_for({"": MODELS, "_of_one_model": MODELS[:1]})
def patching(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer), patch=range(20))
    activation = noise(frame)
    other = activation * 0.9 + np.random.default_rng(2).normal(size=len(frame)) * 0.3
    return plot.patching_agreement(frame.assign(activation_patching=activation, attribution_patching=other))


@drawn_for({"": MODELS[:2], "_of_one_model": MODELS[:1]})
def confidence(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=[n_layer - 1], neuron=range(100))
    draw = np.random.default_rng(2)
    weights = frame.assign(weight_norm=draw.uniform(1, 3, len(frame)), logit_variance=draw.lognormal(-9, 1, len(frame)))
    chosen = frame[frame["neuron"] < 8]
    total = draw.exponential(0.01, len(chosen))
    effects = chosen.assign(total_effect_nats=total, frozen_effect_nats=total * draw.uniform(0, 1, len(chosen)))
    return plot.confidence_neurons(weights, effects)


@drawn_for({"": MODELS, "_of_one_model": MODELS[:1]})
def cumulative_ablation(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, n_ablated=range(6))
    total = 1 + 0.004 * frame["n_ablated"] * (3 - number(frame, "model"))
    frozen = 1 + 0.0005 * frame["n_ablated"]
    values = {"loss_nats": 3 * total, "entropy_nats": 2.8 / total}
    return plot.cumulative_ablation(
        frame.assign(**values, frozen_loss_nats=3 * frozen, frozen_entropy_nats=2.8 / frozen)
    )
