"""Point-wise functions in place of norms: what is trained, what is read of it, and what the report says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from normfree.runner import StudyFolder, final_checkpoint, load_preset, run_config
from normfree.studies.pointwise_norms import ALPHA_FILE, CONFIGURATIONS, _lead, entropy_and_alpha, residual_growth

Command = Callable[..., tuple[int, str, str]]
POINTWISE = ["Dynamic Tanh", "Dynamic Tanh, final LayerNorm", "Dynamic erf", "Dynamic erf, final LayerNorm"]
LABELS = ["LayerNorm", "RMSNorm", *POINTWISE, "No norm"]


def test_configurations_differ_in_their_norms_alone() -> None:
    runs = [run_config(load_preset("cpu"), each, 0) for each in CONFIGURATIONS]
    models = [each.build_model_config(512) for each in runs]
    assert [each.configuration for each in runs] == LABELS
    assert [each.norm for each in models] == ["layernorm", "rmsnorm", "dyt", "dyt", "derf", "derf", "none"]
    final = [each.final_norm for each in models]
    assert final == ["layernorm", "rmsnorm", "dyt", "layernorm", "derf", "layernorm", "layernorm"]
    assert len({each.recipe for each in runs}) == 1


def test_a_study(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "pointwise-norms", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    results = {each.row["configuration"]: each for each in StudyFolder.open(tmp_path / "study").results("runs")}
    assert results.keys() == set(LABELS)
    measured = {label for label, each in results.items() if (each.folder / ALPHA_FILE).exists()}
    assert measured == set(POINTWISE)
    checkpoint = final_checkpoint(results["Dynamic erf"])
    assert checkpoint is not None
    weights = load_file(checkpoint / "model.safetensors")
    alphas = pd.read_parquet(results["Dynamic erf"].folder / ALPHA_FILE)
    assert len(alphas) == 2 * 2  # layers, norms of a block
    for layer, place, alpha in alphas.to_numpy():
        assert weights[f"model.blocks.{layer}.{place}.alpha"] == np.float32(alpha)
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Evaluation loss minus that of LayerNorm, nats: RMSNorm " in page
    assert f"Mean α of Dynamic erf is {alphas.loc[alphas['layer'] == 0, 'alpha'].mean():.2f} in the first layer" in page
    assert {path.name for path in (tmp_path / "study" / "figures").iterdir()} == {
        "entropy-and-alpha.png",
        "entropy-and-alpha.pdf",
        "residual-growth.png",
        "residual-growth.pdf",
    }


def test_runs_that_diverge_are_named(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    options = ("--set", "recipe.learning_rate=1e30", "--set", "recipe.warmup_ratio=0", "--only", "Dynamic erf")
    code, _, err = normfree("study", "pointwise-norms", "--preset", preset_file, "--out", "study", *options)
    assert code == 0, err
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Runs without α, because they diverged or are not measured yet: 1." in page


def test_the_figure_has_means_over_heads_and_seeds_and_gaps_where_they_are_not_finite() -> None:
    key = {"configuration": "Dynamic erf"}
    heads = pd.DataFrame(
        [
            {**key, "seed": seed, "layer": layer, "head": head, "entropy_nats": entropy}
            for seed in (0, 1)
            for layer, entropies in enumerate([(1.0, 2.0), (0.5, math.nan)])
            for head, entropy in enumerate(entropies)
        ]
    )
    alphas = pd.DataFrame(
        [{**key, "seed": seed, "layer": 0, "place": "ffn_norm", "alpha": 0.5 + seed} for seed in (0, 1)]
    )
    left, right = entropy_and_alpha(heads, alphas, bound=2.0).axes
    curve, uniform = left.lines
    assert np.array_equal(np.asarray(curve.get_ydata()), [1.5, math.nan], equal_nan=True)
    assert list(np.asarray(uniform.get_ydata())) == [2.0, 2.0]
    assert [np.asarray(line.get_ydata()).tolist() for line in right.lines] == [[1.0]]
    assert right.lines[0].get_label() == "Dynamic erf"
    assert right.get_title() == "α of the FFN norm"
    assert not entropy_and_alpha(heads, alphas[:0], bound=2.0).axes[1].lines


def test_the_residual_stream_is_that_after_the_last_block() -> None:
    rms = pd.DataFrame(
        [
            {"configuration": name, "seed": 0, "step": step, "layer": layer, "residual_rms": (1 + step) * 10**layer}
            for name in LABELS[2:4]
            for step in (0, 1)
            for layer in (0, 1)
        ]
    )
    (axes,) = residual_growth(rms).axes
    assert [line.get_label() for line in axes.lines] == LABELS[2:4]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [10, 20]
    assert axes.get_yscale() == "log"


def test_the_lead_follows_the_numbers() -> None:
    table = pd.DataFrame({"configuration": LABELS[:5], "loss_difference": [0, -0.1, math.nan, 0.5, 0.25]})
    alphas = pd.DataFrame({"configuration": "Dynamic erf", "layer": [0, 0, 1, 1], "alpha": [0.5, 0.7, 0.3, 0.3]})
    assert _lead(table, alphas) == (
        "Evaluation loss minus that of LayerNorm, nats: RMSNorm -0.100, Dynamic Tanh diverged, "
        "Dynamic Tanh, final LayerNorm +0.500, Dynamic erf +0.250. "
        "Mean α of Dynamic erf is 0.60 in the first layer and 0.30 in the last."
    )
    assert _lead(table[:1], alphas[:0]) == "Only the baseline has been trained yet."
