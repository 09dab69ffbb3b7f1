"""Made-up frames of models with few layers and with many."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

DEPTHS = (2, 6, 12, 30)
HEADS = {2: 2, 6: 8, 12: 12, 30: 9}
FOUR = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")
NORMS = (
    *("Pre-LN", "Pre-LN, scaled init", "Post-LN", "Mix-LN", "DeepNorm", "HybridNorm", "HybridNorm, scaled init"),
    *("HybridNorm*", "HybridNorm*, scaled init", "LayerNorm Scaling", "LayerNorm Scaling, scaled init"),
    *("Dynamic Tanh", "Dynamic erf", "No norm"),
)
SPARSE = ("SM+LN+G", "SM+LN+R", "Spark-FFN", "Spark-FFN (exact)", "Spark-attention", "Spark", "SM+R, Spark-FFN")
MODELS = ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct, norm-free", "Gemma-3-270M")
BOUND = 3.878
SETTING: dict[str, Any] = {"model": "GPT-2", "context_length": 128}
Frame = pd.DataFrame


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


def hybrids(n_layer: int) -> list[str]:
    orders = [f"SM+{a}{{}}{b}{{}}" for a, b in ("GR", "RG")]
    return ["SM+G", "SM+R", *(each.format(i, n_layer - i) for each in orders for i in range(1, n_layer))]
