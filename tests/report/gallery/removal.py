"""Norm removal: its losses, what it costs by size, and predictions of the variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree import plot
from normfree.studies.norm_removal.figures import removal_scaling
from normfree.studies.norm_removal.tables import PowerLaw, power_law

from .frames import HEADS, MODELS, grid, noise, number
from .registry import drawn, drawn_for


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


CORPORA = (
    "installed-python",
    "directory:/home/someone/a/long/path/to/texts",
    "hf:Skylion007/openwebtext",
    "file:b.txt",
)


@drawn_for({"": CORPORA, "_on_one_corpus": CORPORA[:1]})
def reliability(n_layer: int, corpora: Iterable[str]) -> Figure:
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


@drawn_for({"": MODELS, "_of_one_model": MODELS[:1]})
def residual_stds(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer), position=range(64))
    std = (1 + frame["layer"]) * np.where(frame["position"] == 0, 50.0, 1.0)
    return plot.residual_std_by_position(frame.assign(residual_std=std))


@drawn_for({"": MODELS, "_of_one_model": MODELS[:1]})
def first_token(n_layer: int, models: Iterable[str]) -> Figure:
    frame = grid(model=models, layer=range(n_layer))
    stds = frame.assign(first=40.0 + frame["layer"], others_median=1.0 + frame["layer"])
    stds = stds.assign(others_min=0.7 * stds["others_median"], others_max=2 * stds["others_median"])
    sinks = grid(model=models, layer=range(n_layer), head=range(HEADS[n_layer]))
    return plot.first_token_over_depth(
        stds, sinks.assign(sink_share=np.random.default_rng(1).uniform(0, 1, len(sinks)))
    )
