"""Depth diagnostics of several models, and of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from normfree import plot

from .frames import MODELS, NORMS, Frame, grid, noise, number
from .registry import drawn, drawn_for


def apart(n_layer: int, configurations: Iterable[str]) -> Frame:
    frame = grid(configuration=configurations, seed=(0,), layer=range(n_layer), n_apart=range(1, n_layer + 1))
    frame = frame[frame["layer"] + frame["n_apart"] <= n_layer]
    distance = 0.05 + 0.4 * frame["n_apart"] / n_layer - 0.1 * frame["layer"] / n_layer + noise(frame, 0.005)
    return frame.assign(angular_distance=distance)


@drawn_for({"": MODELS, "_of_one_model": MODELS[:1], "_of_norms": NORMS})
def angular_distances(n_layer: int, names: Iterable[str]) -> Figure:
    return plot.angular_distance_heatmaps(apart(n_layer, names))


def by_layer(n_layer: int, names: Iterable[str], column: str, **more: Iterable[Any]) -> Frame:
    frame = grid(configuration=names, seed=(0,), **more, layer=range(n_layer))
    value = np.exp(0.08 * frame["layer"] * (1 + number(frame, "configuration") % 4)) * (1 + noise(frame, 0.03))
    return frame.assign(**{column: value, "standard_error": 0.05 * value})


@drawn_for({"": MODELS, "_of_norms": NORMS})
def residual_variance(n_layer: int, names: Iterable[str]) -> Figure:
    tokens = ("all", "without first")
    frame = by_layer(n_layer, names, "residual_variance", tokens=tokens)
    laws = grid(configuration=names, seed=(0,), tokens=tokens, law=("exponential", "linear"))
    laws = laws.assign(is_best=laws["law"] == "linear")
    return plot.residual_variance_over_depth(frame.assign(fitted_variance=0.95 * frame["residual_variance"]), laws)


@drawn_for({"": MODELS, "_of_norms": NORMS})
def skipped_layers(n_layer: int, names: Iterable[str]) -> Figure:
    frame = by_layer(n_layer, names, "loss_increase_nats")
    frame["loss_increase_nats"] *= np.where(frame["layer"] == 0, 0.3, 0.004)
    frame["standard_error"] *= 0.004
    dropped = frame[frame["layer"] > 0].rename(columns={"layer": "n_dropped"})
    return plot.skipped_layer_losses(frame, dropped)


@drawn
def skipped_layers_of_one_layer(n_layer: int) -> Figure:
    frame = by_layer(1, MODELS[:1], "loss_increase_nats")
    return plot.skipped_layer_losses(frame, frame.rename(columns={"layer": "n_dropped"}).iloc[:0])


@drawn_for({"": MODELS, "_of_norms": NORMS})
def jacobian_distance(n_layer: int, names: Iterable[str]) -> Figure:
    frame = by_layer(n_layer, names, "jacobian_distance")
    norms = by_layer(n_layer, names, "parameter_gradient_norm")
    return plot.jacobian_distance_and_gradient_norms(
        frame, norms.assign(residual_gradient_norm=0.01 * norms["parameter_gradient_norm"])
    )


@drawn
def pruned_layers(n_layer: int) -> Figure:
    orders = ("by angular distance", "by loss increase", "from the last", "from the first")
    return _pruned(n_layer, MODELS[:2], orders)


@drawn
def pruned_layers_of_one_model(n_layer: int) -> Figure:
    return _pruned(n_layer, MODELS[:1], ("angular", "skip-loss"))


def _pruned(n_layer: int, models: Iterable[str], orders: Iterable[str]) -> Figure:
    frame = grid(model=models, order=orders, n_dropped=range(n_layer // 2 + 1))
    increase = 0.3 * frame["n_dropped"] * (1 + number(frame, "order") // 2)
    return plot.pruned_layer_losses(frame.assign(loss_increase_nats=increase, standard_error=0.05))
