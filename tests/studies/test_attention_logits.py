"""Attention logits from the command line, and what the report says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from normfree.probes.optional.qk_logit_max import QK_LOGIT_MAX
from normfree.runner import load_preset
from normfree.runner.study import run_config
from normfree.studies.attention_logits import CONFIGURATIONS, _lead, attention_logits

Command = Callable[..., tuple[int, str, str]]
LABELS = ["SM+LN+G", "SM+LN+G+QK", "SM+G", "SM+G+QK"]


def logits(values: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"configuration": label, "seed": 0, "step": step, "layer": layer, QK_LOGIT_MAX: value + layer}
        for label, of_steps in values.items()
        for step, value in enumerate(of_steps)
        for layer in range(3)
    ]
    return pd.DataFrame(rows)


def test_configurations_differ_in_their_norms_alone() -> None:
    runs = [run_config(load_preset("cpu"), each, 0) for each in CONFIGURATIONS]
    assert [each.configuration for each in runs] == LABELS
    models = [each.build_model_config(512) for each in runs]
    assert [model.norm for model in models] == ["layernorm", "layernorm", "none", "none"]
    assert [model.qk_norm for model in models] == ["none", "layernorm", "none", "layernorm"]
    assert {each.recipe.probes for each in runs} == {(QK_LOGIT_MAX,)}


def test_a_study(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "attention-logits", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    page = (tmp_path / "study" / "report.html").read_text()
    layers = pd.concat(pd.read_parquet(path) for path in (tmp_path / "study" / "runs").rglob("layers.parquet"))
    largest = layers.loc[layers["name"] == QK_LOGIT_MAX, "value"]
    assert len(largest) == 4 * 2 * 2 * 2  # configurations, steps, layers, heads
    assert "Largest attention logit: SM+LN+G " in page
    assert f"{largest.max():.1f}" in page
    figures = {path.name for path in (tmp_path / "study" / "figures").iterdir()}
    assert figures == {"attention-logits.png", "attention-logits.pdf"}


def test_the_figure_has_every_layer_of_every_configuration() -> None:
    figure = attention_logits(logits({"SM+LN+G": [1.0, 2.0], "SM+G": [5.0, math.nan]}))
    panels = figure.axes[:2]  # then the key of the layers
    assert [panel.get_title() for panel in panels] == ["SM+LN+G", "SM+G"]
    assert [np.asarray(line.get_ydata()).tolist() for line in panels[0].lines] == [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]
    last = np.asarray(panels[1].lines[-1].get_ydata()).tolist()
    assert last[0] == 7.0
    assert math.isnan(last[1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([3.0, 1.0, 90.0, 100.0], "QK normalization lowers it in SM+LN+G. QK normalization does not lower it in SM+G."),
        ([3.0, 1.0, math.nan, 2.0], "SM+G nan, SM+G+QK 2.0. QK normalization lowers it in SM+LN+G."),
    ],
)
def test_the_lead_follows_the_numbers(values: list[float], says: str) -> None:
    assert _lead(pd.Series(dict(zip(LABELS, values, strict=True)))).endswith(says)
