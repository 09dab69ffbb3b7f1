"""Gains of the token embeddings, for GELU and ReLU: what they are, and what the report says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.activations import build_activation
from normfree.runner import load_preset, run_config
from normfree.studies.initial_scale import SMALL, STUDY, gained, small_layers

Command = Callable[..., tuple[int, str, str]]


def test_a_gain_multiplies_the_token_embeddings_alone() -> None:
    preset = load_preset("smoke")
    configurations = {each.label: each for each in STUDY.configurations(preset)}
    assert list(configurations) == [
        *("SM+LN+G", "SM+LN+G, ×16"),
        *("SM+LN+R", "SM+LN+R, ×16"),
        *("SM+G", "SM+G, ×4", "SM+G, ×16", "SM+G, ×64"),
        *("SM+R", "SM+R, ×4", "SM+R, ×16", "SM+R, ×64"),
    ]
    embedded = {}
    for label in ("SM+G", "SM+G, ×16"):
        torch.manual_seed(0)
        model = NormfreeForCausalLM(run_config(preset, configurations[label], 0).build_model_config(64))
        embedded[label] = model.model.embed_tokens(torch.arange(64))
    torch.testing.assert_close(embedded["SM+G, ×16"], 16 * embedded["SM+G"])


def test_below_the_bound_gelu_is_linear_and_relu_never_is() -> None:
    x = torch.linspace(-SMALL, SMALL, 101, dtype=torch.float64)
    activations = {name: build_activation(NormfreeConfig(activation=name), 0) for name in ("gelu", "relu")}
    gelu, relu = (each(x) for each in activations.values())
    assert ((gelu - x / 2).abs() <= 0.2 * x.abs()).all()
    torch.testing.assert_close(activations["relu"](1e-3 * x), 1e-3 * relu)
    assert (relu - x / 2).abs().max() == SMALL / 2


def test_small_layers_are_those_of_the_first_record() -> None:
    rms = pd.DataFrame(
        [("a", 0, 1, 0, 0.1), ("a", 0, 1, 1, 0.9), ("a", 1, 1, 1, 0.2), ("a", 0, 9, 1, 0.1), ("b", 0, 1, 0, 3.0)],
        columns=["configuration", "seed", "step", "layer", "residual_rms"],
    )
    assert small_layers(rms) == {"a": [0]}


def test_a_gain_is_compared_in_the_seeds_that_both_models_have() -> None:
    losses = {
        "SM+G": {0: 5.0, 1: 7.0},
        "SM+G, ×4": {0: 4.5},
        "SM+G, ×16": {0: 4.75, 1: 6.75, 2: 1.0},
        "SM+R": {0: 4.0, 1: 4.0},
        "SM+R, ×16": {0: 3.0, 1: float("nan")},
        "SM+LN+G, ×16": {0: 3.0},
    }
    rows = [(label, seed, loss) for label, own in losses.items() for seed, loss in own.items()]
    found = gained(pd.DataFrame(rows, columns=["configuration", "seed", "eval_loss"]))
    nats = found.set_index(["base", "configuration"])["gained_nats"].to_dict()
    assert set(nats) == {("SM+G", "SM+G, ×4"), ("SM+G", "SM+G, ×16"), ("SM+R", "SM+R, ×16")}
    assert (nats["SM+G", "SM+G, ×4"], nats["SM+G", "SM+G, ×16"]) == (0.5, 0.25)
    assert np.isnan(nats["SM+R", "SM+R, ×16"])


def test_the_study_leaves_its_figures(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "initial-scale", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    names: set[Any] = {path.name for path in (tmp_path / "study" / "figures").glob("*.png")}
    assert names == {"perplexity-by-gain.png", "entropy-by-layer.png", "evaluation-loss.png"}
    page = (tmp_path / "study" / "report.html").read_text()
    assert "nats on SM+G; " in page
