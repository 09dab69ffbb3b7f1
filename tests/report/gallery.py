"""Every figure of every study and command, from made-up frames of models with few layers and with many.

``python -m tests.report.gallery FOLDER [NAME ...]`` draws them, to be looked at.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree import plot
from normfree.report import save_figure
from normfree.report.frames import SIGNAL_STATISTICS
from normfree.studies.attention_logits import attention_logits
from normfree.studies.learnable_slopes import LEARNABLE, trajectory_distance_matrix
from normfree.studies.norm_removal.figures import removal_scaling
from normfree.studies.norm_removal.tables import PowerLaw, power_law
from normfree.studies.pointwise_norms import entropy_and_alpha, residual_growth
from normfree.studies.scaling import loss_gap_heatmap

DEPTHS = (2, 6, 12, 30)
HEADS = {2: 2, 6: 8, 12: 12, 30: 9}
FOUR = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")
NORMS = (
    *("Pre-LN", "Pre-LN, scaled init", "Post-LN", "Mix-LN", "DeepNorm", "HybridNorm", "HybridNorm, scaled init"),
    *("HybridNorm*", "HybridNorm*, scaled init", "LayerNorm Scaling", "LayerNorm Scaling, scaled init"),
    *("Dynamic Tanh", "Dynamic erf", "No norm"),
)
POINTWISE = ("Dynamic Tanh", "Dynamic Tanh, final LayerNorm", "Dynamic erf", "Dynamic erf, final LayerNorm")
SPARSE = ("SM+LN+G", "SM+LN+R", "Spark-FFN", "Spark-FFN (exact)", "Spark-attention", "Spark", "SM+R, Spark-FFN")
MODELS = ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct, norm-free", "Gemma-3-270M")
BOUND = 3.878
SETTING: dict[str, Any] = {"model": "GPT-2", "context_length": 128}

Frame = pd.DataFrame
FIGURES: dict[str, Callable[[int], Figure]] = {}


def drawn(figure: Callable[[int], Figure]) -> Callable[[int], Figure]:
    """A figure of the gallery: its function takes the number of layers."""
    FIGURES[figure.__name__] = figure
    return figure


def grid(**places: Iterable[Any]) -> Frame:
    """A row for each combination of the places."""
    values = [list(each) for each in places.values()]
    return pd.DataFrame(list(itertools.product(*values)), columns=list(places))


def number(frame: Frame, column: str) -> Any:
    """Where the values of a column are in the order of their first appearance."""
    return pd.factorize(frame[column])[0]


def noise(frame: Frame, scale: float = 1.0) -> Any:
    return scale * np.random.default_rng(5).normal(size=len(frame))


def heads(
    n_layer: int, configurations: Iterable[str] = FOUR, seeds: Iterable[int] = (0,), **more: Iterable[Any]
) -> Frame:
    frame = grid(configuration=configurations, seed=seeds, **more, layer=range(n_layer), head=range(HEADS[n_layer]))
    draw = np.random.default_rng(3).uniform(0.02, 1, len(frame))
    entropy = BOUND * draw ** np.array([1.1, 1.4, 0.15, 0.5])[number(frame, "configuration") % 4]
    return frame.assign(**SETTING, entropy_nats=entropy)


def layers(
    n_layer: int, configurations: Iterable[str] = FOUR, seeds: Iterable[int] = (0,), **more: Iterable[Any]
) -> Frame:
    return grid(configuration=configurations, seed=seeds, **more, layer=range(n_layer)).assign(**SETTING)


def entropy_over_training(n_layer: int, configurations: Iterable[str] = FOUR, seeds: Iterable[int] = (0,)) -> Frame:
    frame = layers(n_layer, configurations, seeds, step=range(0, 1001, 50))
    end = 0.4 + 3.4 * frame["layer"] / n_layer
    entropy = end + (3.85 - end) * np.exp(-frame["step"] / 300) + noise(frame, 0.01)
    return frame.assign(entropy_nats=entropy.clip(0, BOUND))


def losses(configurations: Iterable[str], seeds: Iterable[int] = (0,)) -> Frame:
    frame = grid(configuration=configurations, seed=seeds, step=range(0, 1001, 100))
    end = 4.4 + 0.05 * (7 * number(frame, "configuration") % 5)
    loss = end + 4.6 * np.exp(-frame["step"] / 160) + noise(frame, 0.004)
    return frame.assign(**SETTING, tokens=frame["step"] * 2048, eval_loss=loss)


@drawn
def headwise_entropy(n_layer: int) -> Figure:
    return plot.headwise_entropy_heatmaps(heads(n_layer), maximum=BOUND)


@drawn
def headwise_entropy_with_nan(n_layer: int) -> Figure:
    frame = heads(n_layer, seeds=(0, 1))
    frame.loc[(frame["configuration"] == "SM+G") & (frame["layer"] > 0) & (frame["seed"] == 1), "entropy_nats"] = np.nan
    frame.loc[frame["configuration"] == "SM+R", "entropy_nats"] = np.nan
    return plot.headwise_entropy_heatmaps(frame, maximum=BOUND)


@drawn
def headwise_entropy_of_one_model(n_layer: int) -> Figure:
    return plot.headwise_entropy_heatmaps(heads(n_layer, ["openai-community/gpt2"]), maximum=4.2)


@drawn
def headwise_entropy_of_many(n_layer: int) -> Figure:
    return plot.headwise_entropy_heatmaps(heads(n_layer, SPARSE), maximum=BOUND)


@drawn
def headwise_entropy_at_the_bound(n_layer: int) -> Figure:
    frame = heads(n_layer, FOUR[2:])
    return plot.headwise_entropy_heatmaps(frame.assign(entropy_nats=BOUND - 0.002 * frame["layer"]), maximum=BOUND)


@drawn
def entropy_distribution(n_layer: int) -> Figure:
    return plot.headwise_entropy_distribution(heads(n_layer))


@drawn
def entropy_distribution_of_seeds(n_layer: int) -> Figure:
    frame = heads(n_layer, SPARSE, seeds=(0, 1, 2))
    frame.loc[(frame["configuration"] == "Spark") & (frame["seed"] == 1), "entropy_nats"] = np.nan
    return plot.headwise_entropy_distribution(frame)


@drawn
def layerwise_entropy(n_layer: int) -> Figure:
    return plot.layerwise_entropy_dynamics(entropy_over_training(n_layer), bound=BOUND)


@drawn
def layerwise_entropy_of_one_model(n_layer: int) -> Figure:
    return plot.layerwise_entropy_dynamics(entropy_over_training(n_layer, ["SM+G"], seeds=(0, 1)), bound=BOUND)


@drawn
def layerwise_entropy_with_nan(n_layer: int) -> Figure:
    frame = entropy_over_training(n_layer, [*FOUR, "layerwise 0.01", "global 0.01"])
    frame.loc[(frame["configuration"] == "SM+G") & (frame["step"] > 600), "entropy_nats"] = np.nan
    frame.loc[frame["configuration"] == "SM+R", "entropy_nats"] = np.nan
    return plot.layerwise_entropy_dynamics(frame, bound=BOUND)


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


def hybrids(n_layer: int) -> list[str]:
    orders = [f"SM+{a}{{}}{b}{{}}" for a, b in ("GR", "RG")]
    return ["SM+G", "SM+R", *(each.format(i, n_layer - i) for each in orders for i in range(1, n_layer))]


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


@drawn
def entropy_by_layer(n_layer: int) -> Figure:
    frame = heads(n_layer, hybrids(n_layer))
    marked = {name: range(n_layer // 2) for name in hybrids(n_layer)[::2]}
    return plot.layer_entropy_by_configuration(frame, marked=marked, mark="GELU", maximum=BOUND)


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
def entropy_thresholds(n_layer: int) -> Figure:
    frame = entropy_over_training(n_layer, ["SM+G, penalty 0.001"]).merge(
        pd.DataFrame({"head": range(HEADS[n_layer])}), how="cross"
    )
    threshold = 2.0 + 0.1 * frame["head"] + 0.0004 * frame["step"]
    return plot.entropy_threshold_trajectories(frame.assign(entropy_threshold_nats=threshold), bound=BOUND)


@drawn
def negative_slopes(n_layer: int) -> Figure:
    frame = layers(n_layer, LEARNABLE, step=range(0, 1001, 50))
    initial = frame["configuration"].map(lambda name: LEARNABLE[name][1])
    frame = frame.assign(negative_slope=initial * np.exp(-frame["step"] / 400) + 0.02 * frame["layer"] / n_layer)
    is_global = frame["configuration"].str.startswith("global")
    alone = frame[frame["layer"] == 0].assign(negative_slope=initial * 0.9)[["configuration", "step", "negative_slope"]]
    return plot.negative_slope_trajectories(frame[~is_global | (frame["layer"] == 0)], decay_only=alone)


@drawn
def trajectory_distances(n_layer: int) -> Figure:
    names = [*FOUR, "layerwise 0.01", "global 0.01"]
    values = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0))) * 0.2
    np.fill_diagonal(values, np.nan)
    return trajectory_distance_matrix(pd.DataFrame(values, names, names))


@drawn
def instability(n_layer: int) -> Figure:
    names = ("SM+R", "SM+L 0.01", "SM+L 0.05", "SM+L 0.1", "SM+L 0.2")
    entropy = entropy_over_training(n_layer, names)
    broken = (entropy["configuration"] == "SM+L 0.2") & (entropy["step"] > 500)
    count = np.where(broken, 1000 * (1 + entropy["layer"]), 0)
    counts = entropy.assign(scores_nan_count=count, scores_inf_count=0, residual_nan_count=0, residual_inf_count=count)
    entropy.loc[broken, "entropy_nats"] = np.nan
    return plot.instability_dynamics(counts, entropy, bound=BOUND)


@drawn
def stability(n_layer: int) -> Figure:
    entropy = entropy_over_training(n_layer, ["SM+R"])
    zero = dict.fromkeys(("scores_nan_count", "scores_inf_count", "residual_nan_count", "residual_inf_count"), 0)
    return plot.instability_dynamics(entropy.assign(**zero), entropy, bound=BOUND)


@drawn
def norm_removal(n_layer: int) -> Figure:
    names = ("SM+LN+G", "SM+LN+R")
    frame = grid(configuration=names, variant=("vanilla", "norm-free"), step=range(1, 301))
    loss = 3.2 + 0.4 * np.exp(-frame["step"] / 60) + 0.1 * (frame["variant"] == "norm-free")
    removed = grid(configuration=names, part=("ffn", "attention_qk", "attention_v"), layer=range(n_layer))
    removed = removed.assign(step=20 + 60 * number(removed, "part") + 60 * removed["layer"] // n_layer)
    ends = grid(configuration=names, part=("final", "end_of_text", "first_token"), layer=[-1])
    removed = pd.concat([removed, ends.assign(step=200 + 10 * number(ends, "part"))])
    return plot.removal_loss_curves(frame.assign(loss_nats=loss + noise(frame, 0.05)), removed)


@drawn
def norm_removal_by_size(n_layer: int) -> Figure:
    return _removal_by_size(("tiny", "small", "medium", "large"), power_law)


@drawn
def norm_removal_of_one_size(n_layer: int) -> Figure:
    return _removal_by_size(("tiny",), lambda *_: PowerLaw(float("nan"), float("nan"), float("nan"), float("nan"), 1))


def _removal_by_size(sizes: Iterable[str], law: Callable[..., PowerLaw]) -> Figure:
    frame = grid(size=sizes, seed=(0, 1), finetuning_tokens=(100_000, 200_000, 400_000, 800_000))
    frame = frame.assign(parameters=300_000 * 4 ** number(frame, "size"))
    excess = 0.2 * (1 + number(frame, "size")) * (100_000 / frame["finetuning_tokens"]) + 0.01 * frame["seed"]
    reached = frame.drop_duplicates(["size", "seed"]).assign(bound="interpolated", tokens=lambda x: x["parameters"] / 3)
    reached.loc[reached["size"] == "large", "bound"] = "more than"
    fit = law(reached["parameters"].tolist(), reached["tokens"].tolist())
    return removal_scaling(frame.assign(excess_nats=excess), reached, fit, threshold=0.05)


@drawn
def sparsity(n_layer: int) -> Figure:
    frame = layers(n_layer, SPARSE)
    share = np.array([1.0, 0.3, 0.08, 0.08, 1.0, 0.08, 0.02])[number(frame, "configuration")]
    share = np.where(share < 1, share * (1 + 0.5 * frame["layer"] / n_layer), share)
    frame = frame.assign(active_share=share, attended_keys=np.nan)
    steps = pd.DataFrame({"step": range(0, 1001, 100)}).assign(tokens=lambda each: 2048 * each["step"])
    return plot.active_neurons(frame, frame.merge(steps, how="cross"), nominal=0.08)


def apart(n_layer: int, configurations: Iterable[str]) -> Frame:
    frame = grid(configuration=configurations, seed=(0,), layer=range(n_layer), n_apart=range(1, n_layer + 1))
    frame = frame[frame["layer"] + frame["n_apart"] <= n_layer]
    distance = 0.05 + 0.4 * frame["n_apart"] / n_layer - 0.1 * frame["layer"] / n_layer + noise(frame, 0.005)
    return frame.assign(angular_distance=distance)


@drawn
def angular_distances(n_layer: int) -> Figure:
    return plot.angular_distance_heatmaps(apart(n_layer, MODELS))


@drawn
def angular_distances_of_one_model(n_layer: int) -> Figure:
    return plot.angular_distance_heatmaps(apart(n_layer, MODELS[:1]))


@drawn
def angular_distances_of_norms(n_layer: int) -> Figure:
    return plot.angular_distance_heatmaps(apart(n_layer, NORMS))


def by_layer(n_layer: int, names: Iterable[str], column: str, **more: Iterable[Any]) -> Frame:
    frame = grid(configuration=names, seed=(0,), **more, layer=range(n_layer))
    value = np.exp(0.08 * frame["layer"] * (1 + number(frame, "configuration") % 4)) * (1 + noise(frame, 0.03))
    return frame.assign(**{column: value, "standard_error": 0.05 * value})


def variance(n_layer: int, names: Iterable[str]) -> Figure:
    tokens = ("all", "without first")
    frame = by_layer(n_layer, names, "residual_variance", tokens=tokens)
    laws = grid(configuration=names, seed=(0,), tokens=tokens, law=("exponential", "linear"))
    laws = laws.assign(is_best=laws["law"] == "linear")
    return plot.residual_variance_over_depth(frame.assign(fitted_variance=0.95 * frame["residual_variance"]), laws)


@drawn
def residual_variance(n_layer: int) -> Figure:
    return variance(n_layer, MODELS)


@drawn
def residual_variance_of_norms(n_layer: int) -> Figure:
    return variance(n_layer, NORMS)


def skipped(n_layer: int, names: Iterable[str]) -> Figure:
    frame = by_layer(n_layer, names, "loss_increase_nats")
    frame["loss_increase_nats"] *= np.where(frame["layer"] == 0, 0.3, 0.004)
    frame["standard_error"] *= 0.004
    dropped = frame[frame["layer"] > 0].rename(columns={"layer": "n_dropped"})
    return plot.skipped_layer_losses(frame, dropped)


@drawn
def skipped_layers(n_layer: int) -> Figure:
    return skipped(n_layer, MODELS)


@drawn
def skipped_layers_of_norms(n_layer: int) -> Figure:
    return skipped(n_layer, NORMS)


@drawn
def skipped_layers_of_one_layer(n_layer: int) -> Figure:
    frame = by_layer(1, MODELS[:1], "loss_increase_nats")
    return plot.skipped_layer_losses(frame, frame.rename(columns={"layer": "n_dropped"}).iloc[:0])


def jacobian(n_layer: int, names: Iterable[str]) -> Figure:
    frame = by_layer(n_layer, names, "jacobian_distance")
    norms = by_layer(n_layer, names, "parameter_gradient_norm")
    return plot.jacobian_distance_and_gradient_norms(
        frame, norms.assign(residual_gradient_norm=0.01 * norms["parameter_gradient_norm"])
    )


@drawn
def jacobian_distance(n_layer: int) -> Figure:
    return jacobian(n_layer, MODELS)


@drawn
def jacobian_distance_of_norms(n_layer: int) -> Figure:
    return jacobian(n_layer, NORMS)


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


@drawn
def attribution_errors(n_layer: int) -> Figure:
    return _attribution_errors(n_layer, MODELS)


@drawn
def attribution_errors_of_one_model(n_layer: int) -> Figure:
    return _attribution_errors(n_layer, MODELS[:1])


def _attribution_errors(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer), head=range(HEADS[n_layer]))
    nmae = np.random.default_rng(0).uniform(0.02, 1.2, len(frame)) * (number(frame, "model") != 1)
    return plot.attribution_error_heatmaps(frame.assign(nmae=nmae))


@drawn
def patching(n_layer: int) -> Figure:
    return _patching(n_layer, MODELS)


@drawn
def patching_of_one_model(n_layer: int) -> Figure:
    return _patching(n_layer, MODELS[:1])


def _patching(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer), patch=range(20))
    activation = noise(frame)
    other = activation * 0.9 + np.random.default_rng(2).normal(size=len(frame)) * 0.3
    return plot.patching_agreement(frame.assign(activation_patching=activation, attribution_patching=other))


@drawn
def confidence(n_layer: int) -> Figure:
    return _confidence(n_layer, MODELS[:2])


@drawn
def confidence_of_one_model(n_layer: int) -> Figure:
    return _confidence(n_layer, MODELS[:1])


def _confidence(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=[n_layer - 1], neuron=range(100))
    draw = np.random.default_rng(2)
    weights = frame.assign(weight_norm=draw.uniform(1, 3, len(frame)), logit_variance=draw.lognormal(-9, 1, len(frame)))
    chosen = frame[frame["neuron"] < 8]
    total = draw.exponential(0.01, len(chosen))
    effects = chosen.assign(total_effect_nats=total, frozen_effect_nats=total * draw.uniform(0, 1, len(chosen)))
    return plot.confidence_neurons(weights, effects)


@drawn
def cumulative_ablation(n_layer: int) -> Figure:
    return _cumulative_ablation(MODELS)


@drawn
def cumulative_ablation_of_one_model(n_layer: int) -> Figure:
    return _cumulative_ablation(MODELS[:1])


def _cumulative_ablation(models: Iterable[str]) -> Figure:
    frame = grid(model=models, n_ablated=range(6))
    total = 1 + 0.004 * frame["n_ablated"] * (3 - number(frame, "model"))
    frozen = 1 + 0.0005 * frame["n_ablated"]
    values = {"loss_nats": 3 * total, "entropy_nats": 2.8 / total}
    return plot.cumulative_ablation(
        frame.assign(**values, frozen_loss_nats=3 * frozen, frozen_entropy_nats=2.8 / frozen)
    )


CORPORA = (
    "installed-python",
    "directory:/home/someone/a/long/path/to/texts",
    "hf:Skylion007/openwebtext",
    "file:b.txt",
)


@drawn
def reliability(n_layer: int) -> Figure:
    return _reliability(CORPORA)


@drawn
def reliability_on_one_corpus(n_layer: int) -> Figure:
    return _reliability(CORPORA[:1])


def _reliability(corpora: Iterable[str]) -> Figure:
    frame = grid(corpus=corpora, model=("original", "vanilla", "norm-free"), low=np.arange(10) / 10)
    middle = frame["low"] + 0.05
    bins = frame.assign(high=frame["low"] + 0.1, tokens=2000 * (1.1 - middle), confidence=middle)
    evaluation = frame[["corpus", "model"]].drop_duplicates().assign(ece=0.0193)
    return plot.reliability_diagrams(bins.assign(accuracy=middle ** (1 + number(frame, "model") / 4)), evaluation)


@drawn
def losses_by_position(n_layer: int) -> Figure:
    return _losses_by_position(CORPORA, 1024)


@drawn
def losses_by_position_on_one_corpus(n_layer: int) -> Figure:
    return _losses_by_position(CORPORA[:1], 16)


def _losses_by_position(corpora: Iterable[str], n_token: int) -> Figure:
    frame = grid(corpus=corpora, model=("original", "vanilla", "norm-free"), position=range(1, n_token))
    loss = 3 + 4 / frame["position"] ** 0.5 + 0.1 * number(frame, "model")
    return plot.loss_by_position(frame.assign(tokens=256, loss_nats=loss))


@drawn
def residual_stds(n_layer: int) -> Figure:
    return _residual_stds(n_layer, MODELS)


@drawn
def residual_stds_of_one_model(n_layer: int) -> Figure:
    return _residual_stds(n_layer, MODELS[:1])


def _residual_stds(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer), position=range(64))
    std = (1 + frame["layer"]) * np.where(frame["position"] == 0, 50.0, 1.0)
    return plot.residual_std_by_position(frame.assign(residual_std=std))


@drawn
def first_token(n_layer: int) -> Figure:
    return _first_token(n_layer, MODELS)


@drawn
def first_token_of_one_model(n_layer: int) -> Figure:
    return _first_token(n_layer, MODELS[:1])


def _first_token(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer))
    stds = frame.assign(first=40.0 + frame["layer"], others_median=1.0 + frame["layer"])
    stds = stds.assign(others_min=0.7 * stds["others_median"], others_max=2 * stds["others_median"])
    sinks = grid(model=models, layer=range(n_layer), head=range(HEADS[n_layer]))
    return plot.first_token_over_depth(
        stds, sinks.assign(sink_share=np.random.default_rng(1).uniform(0, 1, len(sinks)))
    )


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


def draw(folder: Path, names: Iterable[str]) -> None:
    for name, n_layer in itertools.product(names, DEPTHS):
        save_figure(FIGURES[name](n_layer), folder, f"{name}-{n_layer:02}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2:] or list(FIGURES))
