"""The two studies of sparse layers from the command line, on a made-up corpus."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from normfree import NormfreeForCausalLM
from normfree.runner import StudyFolder, load_preset, run_config
from normfree.studies.spark.study import CURVE, NORMS, PREDICTOR, STUDY, costs_frame, savings_frame
from normfree.training.records import LAYERS_FILE

Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("few_rounds")
DIVERGING = ("--set", "recipe.learning_rate=1e30", "--set", "recipe.warmup_ratio=0")
SMALL = ("--set", "recipe.steps=2", "--set", "recipe.telemetry_steps=1", "--set", "recipe.eval_steps=1")


def test_the_configurations_have_the_parameters_of_dense_models() -> None:
    preset = load_preset("cpu")
    configs = {
        each.label: run_config(preset, each, seed=0).build_model_config(512) for each in STUDY.configurations(preset)
    }
    assert list(configs) == [
        *("SM+LN+G", "SM+LN+R", "Spark-FFN", "Spark-FFN (exact)", "Spark-attention", "Spark"),
        *("SM+R", "SM+R, Spark-FFN", "SM+R, Spark"),
    ]
    both = configs["SM+R, Spark"]
    assert (both.norm, both.ffn, both.attention, both.topk) == ("none", "spark", "spark", "statistical")
    assert both.spark_sizes.attention_active == 16
    assert both.spark_sizes.ffn_active == round(0.08 * 512)
    assert configs["Spark-FFN (exact)"].topk == "exact"
    shares = [each.model.get("ffn_active") for each in CURVE.configurations(preset)]
    assert shares == [None, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0]


def test_the_study_measures_sparsity_once_and_shows_it(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "spark", "--preset", preset_file, "--out", "study", *SMALL)
    code, out, err = normfree(*command)
    assert code == 0, err
    folder = tmp_path / "study"
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert names == {"active-neurons.png", "headwise-entropy.png", "evaluation-loss.png"}
    page = (folder / "report.html").read_text()
    assert "Published, not measured here: the abstract of Spark Transformer" in page
    assert "1.79 times at most" in page
    assert "SM+R, Spark-FFN" in out

    results = {each.row["configuration"]: each for each in StudyFolder.open(folder).results("runs")}
    assert len({each.row["n_parameters"] for label, each in results.items() if "SM+R" in label}) == 1
    measured = {label: pd.read_parquet(each.folder / "sparsity.parquet") for label, each in results.items()}
    exact = measured["Spark-FFN (exact)"]
    assert exact["active_share"].tolist() == [5 / 64] * 2
    assert measured["SM+LN+G"]["active_share"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert measured["SM+LN+G"]["attended_keys"].isna().all()
    assert measured["Spark"]["attended_keys"].between(1, 6).all()
    layers = pd.read_parquet(results["Spark"].folder / LAYERS_FILE)
    assert {"active_share", "attended_keys"} <= set(layers["name"])

    frame = pd.concat([each.assign(configuration=label, seed=0) for label, each in measured.items()])
    flops = savings_frame(results.values(), frame).set_index("configuration")["flops"]
    # two layers of width 16, 64 neurons, two heads: 8.5 keys on average
    assert flops["SM+LN+G"] == pytest.approx(
        2 * 2 * (4 * 16 * 16 + 2 * 16 * 8.5 + 2 * 16 * 64 * 0.5 + 16 * 64), rel=1e-3
    )
    assert flops["Spark-FFN (exact)"] == 2 * 2 * (4 * 256 + 2 * 16 * 8.5 + 8 * 64 + 5 * (8 + 16))

    timed = {path.parents[1].name: pd.read_parquet(path) for path in folder.rglob("decode.parquet")}
    assert set(timed) == {"spark-ffn", "spark-attention", "spark", "sm-r-spark-ffn", "sm-r-spark"}
    for decode in timed.values():
        assert decode["context_length"].unique().tolist() == [8 + 7 / 2], "half of 16 positions at first, then 7 more"
        assert (decode[["dense_seconds", "masked_seconds", "sparse_seconds"]] > 0).all(axis=None)
    assert "Decode, × as fast" in page

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    code, out, err = normfree("report", "study", "--json")
    assert code == 0, err
    assert len(json.loads(out)["table"]) == 9
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == times


def test_the_curve_of_active_neurons(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "spark-active", "--preset", preset_file, "--out", "study", *SMALL)
    assert code == 0, err
    assert (tmp_path / "study" / "figures" / "perplexity-by-share.png").exists()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "active 2 %" in page
    assert "Perplexity against dense SM+LN+G: " in page


def test_predictors_of_every_size_have_as_many_weights() -> None:
    preset = load_preset("cpu")
    dense, *sparse, without = (
        NormfreeForCausalLM(run_config(preset, each, 0).build_model_config(512))
        for each in PREDICTOR.configurations(preset)
    )
    assert [model.config.spark_sizes.ffn_predictor_dim for model in sparse] == [16, 32, 64, 96]
    assert {model.num_parameters() for model in (*sparse, without)} == {dense.num_parameters()}
    assert (without.config.ffn, without.config.spark_sizes.ffn_active) == ("topk", round(0.08 * 512))


def test_the_curve_of_predictors(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "spark-predictor", "--preset", preset_file, "--out", "study", *SMALL)
    assert code == 0, err
    assert (tmp_path / "study" / "figures" / "perplexity-by-share.png").exists()
    report = (tmp_path / "study" / "report.html").read_text()
    assert "predictor 12.5 %" in report
    assert "no predictor" in report


def test_networks_with_and_without_norms_are_of_one_size() -> None:
    preset = load_preset("cpu")
    configurations = NORMS.configurations(preset)
    networks = ("", ", gated", ", Spark-FFN, all", ", Spark-FFN", ", Spark-FFN (exact)")
    assert [each.label for each in configurations] == [
        dense + name for dense in ("SM+LN+R", "SM+R") for name in networks
    ]
    for each in configurations:
        config = run_config(preset, each, seed=0).build_model_config(512)
        assert (config.norm, config.activation) == ("none" if each.label.startswith("SM+R") else "layernorm", "relu")
        weights = {"gated": 3, "spark": 2, "dense": 2}[config.ffn] * config.n_inner * config.n_embd
        assert weights == pytest.approx(2 * 512 * 128, rel=2e-3), each.label


def test_the_cost_of_a_network_is_that_of_the_seeds_that_its_dense_one_has() -> None:
    losses = pd.DataFrame(
        [
            *[("SM+R", seed, 3.0 + seed) for seed in (0, 1, 2)],
            *[("SM+R, gated", seed, 3.5 + seed) for seed in (0, 2, 3)],
            ("SM+R, Spark-FFN", 1, float("nan")),
            ("SM+LN+R, gated", 0, 2.0),
            ("SM+LN+R", 1, 2.0),
        ],
        columns=["configuration", "seed", "eval_loss"],
    )
    costs = costs_frame(losses)
    assert costs[["network", "norms", "seeds"]].to_numpy().tolist() == [["gated", False, 2], ["Spark-FFN", False, 1]]
    assert costs["nats"].tolist() == pytest.approx([0.5, float("nan")], nan_ok=True)
    assert costs["nats_half_width"].tolist() == pytest.approx([0.0, float("nan")], nan_ok=True)


def test_what_a_network_costs_with_and_without_norms(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    seeds = ("--seeds", "0,1")
    code, out, err = normfree("study", "spark-norms", "--preset", preset_file, "--out", "study", *SMALL, *seeds)
    assert code == 0, err
    results = StudyFolder.open(tmp_path / "study").results("runs")
    losses = {(each.row["configuration"], each.row["seed"]): each.row["eval_loss"] for each in results}
    page = (tmp_path / "study" / "report.html").read_text()
    for dense in ("SM+LN+R", "SM+R"):
        costs = [losses[f"{dense}, gated", seed] - losses[dense, seed] for seed in (0, 1)]
        assert f"{sum(costs) / 2:+.3f}".replace("-", "−") in page
    assert "Perplexity against dense SM+LN+R: " in page
    assert "SM+R, Spark-FFN, all" in out


def test_diverged_runs_are_nan(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "spark", "--preset", preset_file, "--out", "study", *SMALL, *DIVERGING)
    assert code == 0, err
    results = StudyFolder.open(tmp_path / "study").results("runs")
    diverged = [each for each in results if each.row["status"] == "diverged"]
    assert diverged
    for each in diverged:
        if not (each.folder / "checkpoint-2").exists():
            assert np.isnan(pd.read_parquet(each.folder / "sparsity.parquet")["active_share"]).all()
    assert "NaN" in (tmp_path / "study" / "report.html").read_text()
