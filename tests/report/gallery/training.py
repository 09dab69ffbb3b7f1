"""Losses, signal propagation, slopes, sparsity, and the maps of studies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree import plot
from normfree.report.frames import SIGNAL_STATISTICS
from normfree.studies.attention_logits import attention_logits
from normfree.studies.learnable_slopes import LEARNABLE
from normfree.studies.pointwise_norms import entropy_and_alpha, residual_growth
from normfree.studies.scaling import loss_gap_heatmap

from .frames import BOUND, FOUR, NORMS, SPARSE, Frame, grid, heads, hybrids, layers, losses, number
from .registry import drawn


@drawn
def evaluation_loss(n_layer: int) -> Figure:
    frame = losses(FOUR, (0, 1))
    frame.loc[(frame["configuration"] == "SM+G") & (frame["seed"] == 1) & (frame["step"] > 400), "eval_loss"] = np.nan
    return plot.evaluation_loss_curves(frame)


@drawn
def evaluation_loss_of_norms(n_layer: int) -> Figure:
    return plot.evaluation_loss_curves(losses(NORMS))


@drawn
def evaluation_loss_of_hybrids(n_layer: int) -> Figure:
    return plot.evaluation_loss_curves(losses(hybrids(n_layer)))


@drawn
def perplexity_by_split(n_layer: int) -> Figure:
    frame = grid(line=("GELU first", "ReLU first"), place=range(n_layer + 1))
    share = frame["place"] / n_layer
    part = np.where(frame["line"] == "GELU first", share, 1 - share)
    ppl = 95 + 40 * part**2
    values: dict[str, Any] = {"eval_ppl": ppl, "eval_ppl_low": ppl - 3, "eval_ppl_high": ppl + 3}
    return plot.perplexity_and_overload(
        frame.assign(**values, value=frame["place"].map(str), top_band=0.2 + 0.6 * part),
        changed="layers with the first activation",
    )


def signal(frame: Frame) -> Frame:
    grown = np.exp(0.1 * frame["layer"] * (1 + number(frame, "configuration")) / 2)
    values = (0.3 * grown, 1 + 3 * grown, grown - 1, 4 * grown, np.clip(0.1 * grown, 0, 1))
    return frame.assign(**dict(zip(SIGNAL_STATISTICS, values, strict=True)))


@drawn
def signal_over_depth(n_layer: int) -> Figure:
    return plot.signal_propagation_over_depth(signal(layers(n_layer, seeds=(0, 1))))


@drawn
def signal_over_training(n_layer: int) -> Figure:
    return plot.signal_propagation_dynamics(signal(layers(n_layer, step=range(0, 1001, 50))))


@drawn
def negative_slopes(n_layer: int) -> Figure:
    frame = layers(n_layer, LEARNABLE, step=range(0, 1001, 50))
    initial = frame["configuration"].map(lambda name: LEARNABLE[name][1])
    frame = frame.assign(negative_slope=initial * np.exp(-frame["step"] / 400) + 0.02 * frame["layer"] / n_layer)
    is_global = frame["configuration"].str.startswith("global")
    alone = frame[frame["layer"] == 0].assign(negative_slope=initial * 0.9)[["configuration", "step", "negative_slope"]]
    return plot.negative_slope_trajectories(frame[~is_global | (frame["layer"] == 0)], decay_only=alone)


@drawn
def loss_gaps(n_layer: int) -> Figure:
    sizes = ["base", "width 64", "width 256", f"depth {n_layer // 2}", f"depth {2 * n_layer}"]
    values = np.linspace(-0.1, 0.5, 20).reshape(4, 5)
    values[2, 1:3] = np.nan
    gap = pd.DataFrame(values, ["0.0005", "0.001", "0.002", "own best"], sizes)
    return loss_gap_heatmap(gap, first="SM+G", second="SM+R")


@drawn
def loss_gaps_of_one_size(n_layer: int) -> Figure:
    gap = pd.DataFrame([[0.1], [0.05]], ["0.001", "own best"], ["base, T = 128"])
    return loss_gap_heatmap(gap, first="SM+G", second="SM+R")


POINTWISE = ("Dynamic Tanh", "Dynamic Tanh, final LayerNorm", "Dynamic erf", "Dynamic erf, final LayerNorm")


@drawn
def pointwise_norms(n_layer: int) -> Figure:
    frame = heads(n_layer, ["LayerNorm", "RMSNorm", *POINTWISE, "No norm"])
    alphas = grid(configuration=POINTWISE, place=("attention_norm", "ffn_norm"), layer=range(n_layer))
    alphas = alphas.assign(alpha=0.5 + 0.1 * number(alphas, "place") + 0.02 * alphas["layer"])
    return entropy_and_alpha(frame, alphas, bound=BOUND)


@drawn
def pointwise_norms_without_alpha(n_layer: int) -> Figure:
    alphas = pd.DataFrame(columns=["configuration", "place", "layer", "alpha"])
    return entropy_and_alpha(heads(n_layer, ["LayerNorm"]), alphas, bound=BOUND)


@drawn
def pointwise_residual_growth(n_layer: int) -> Figure:
    frame = layers(n_layer, ["LayerNorm", *POINTWISE], step=range(0, 1001, 50))
    return residual_growth(frame.assign(residual_rms=1 + frame["step"] * number(frame, "configuration")))


@drawn
def logits(n_layer: int) -> Figure:
    frame = layers(n_layer, ["SM+LN+G", "SM+LN+G+QK", "SM+G", "SM+G+QK"], step=range(0, 1001, 50))
    largest = np.exp(frame["step"] / 400) * (1 + frame["layer"]) * (1 + number(frame, "configuration"))
    return attention_logits(frame.assign(qk_logit_max=largest))


@drawn
def sparsity(n_layer: int) -> Figure:
    frame = layers(n_layer, SPARSE)
    share = np.array([1.0, 0.3, 0.08, 0.08, 1.0, 0.08, 0.02])[number(frame, "configuration")]
    share = np.where(share < 1, share * (1 + 0.5 * frame["layer"] / n_layer), share)
    frame = frame.assign(active_share=share, attended_keys=np.nan)
    steps = pd.DataFrame({"step": range(0, 1001, 100)}).assign(tokens=lambda each: 2048 * each["step"])
    return plot.active_neurons(frame, frame.merge(steps, how="cross"), nominal=0.08)
