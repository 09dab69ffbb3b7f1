"""The studies of norm removal from the command line, on a made-up corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM

from normfree.removal import finetuning
from normfree.runner import load_preset, run_config
from normfree.studies.norm_removal.scaling import SIZE_FACTORS
from normfree.studies.norm_removal.scaling import configurations as sizes
from normfree.studies.norm_removal.study import GPT_2, PYTHIA, configurations, llama

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def preset_file(preset_content: dict[str, Any], tmp_path: Path) -> Path:
    """Twelve steps, one budget of as many, one rate; the schedule takes its last norm out after a third of them."""
    recipe = {**preset_content["recipe"], "steps": 12, "eval_steps": 12, "save_steps": 12}
    removal = {"budget_shares": [1.0], "learning_rates": [1e-3]}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**preset_content, "recipe": recipe, "removal": removal}))
    return path


def test_the_three_architectures_are_those_of_their_names() -> None:
    preset = load_preset("removal-cpu")
    gpt2, pythia, small_llama = (
        run_config(preset, each, seed=0).build_model_config(4096) for each in configurations(preset)
    )
    assert (gpt2.position, gpt2.norm, gpt2.tie_word_embeddings) == ("learned", "layernorm", True)
    assert (pythia.position, pythia.parallel_residual, pythia.norm) == ("rotary", True, "layernorm")
    assert (small_llama.position, small_llama.norm, small_llama.ffn) == ("rotary", "rmsnorm", "gated")
    dense = 2 * gpt2.n_inner * gpt2.n_embd
    assert abs(3 * small_llama.n_inner * small_llama.n_embd / dense - 1) < 0.02
    assert small_llama.n_inner % 8 == 0
    assert [each.label for each in (GPT_2, PYTHIA, llama(128))] == ["GPT-2 style", "Pythia style", "Llama style"]


@pytest.mark.parametrize("name", ["removal-cpu", "removal-scaling-cpu"])
def test_the_sizes_scale_depth_and_width_at_once(name: str) -> None:
    preset = load_preset(name)
    models = [run_config(preset, each, seed=0).build_model_config(4096) for each in sizes(preset)]
    own = models[SIZE_FACTORS.index(1.0)]
    assert (own.n_layer, own.n_embd) == (preset.model["n_layer"], preset.model["n_embd"])
    assert [model.n_layer / own.n_layer for model in models] == list(SIZE_FACTORS)
    assert {model.head_dim for model in models} == {own.head_dim}


def test_norms_are_removed_from_every_base_and_shown(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "norm-removal", "--preset", preset_file, "--out", "study")
    code, _, err = normfree(*command)
    assert code == 0, err
    folder = tmp_path / "study"
    removals = pd.read_csv(folder / "removals.csv")
    assert len(removals) == 3 * 3, "configurations, variants"
    assert np.isfinite(removals["eval_loss"]).all()
    assert set(removals["finetuning_tokens"]) == {12 * 4 * 16}
    one = folder / "runs" / "llama-style" / "seed-0" / "removals" / "budget-1" / "learning-rate-0.001"
    assert AutoModelForCausalLM.from_pretrained(one / "norm-free").config.norm == "none"
    chosen = (removals["configuration"] == "Llama style") & (removals["variant"] == "norm-free")
    table = pd.read_csv(one / "removal.csv").set_index("variant")
    assert removals.loc[chosen, "eval_loss"].tolist() == [table.loc["norm-free", "eval_loss"]]

    page = (folder / "report.html").read_text()
    assert "GPT-2 style, 100 % of the training tokens: without norms" in page
    assert "Published, not measured here" in page
    assert "2.4799" in page, "GPT-2 XL, vanilla"
    assert "The best rate is the smallest or the largest of those that were tried" in page
    assert (folder / "figures" / "removal-loss.pdf").exists()

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("removal.csv")}
    assert len(times) == 3
    assert normfree(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (folder / "report.html").read_text() == page


def test_tokens_by_size(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "norm-removal-scaling", "--preset", preset_file, "--out", "study")
    code, _, err = normfree(*command, "--set", "removal.budget_shares=[0.75, 1.5]")
    assert code == 0, err
    reached = pd.read_csv(tmp_path / "study" / "tokens_to_threshold.csv")
    assert reached["size"].tolist() == ["size 0.5", "size 1", "size 1.5", "size 2"]
    assert set(reached["bound"]) == {"at most"}, "such a small model is no worse without norms"
    # Of a block: 12 d² + 13 d weights and biases; 2 d of the final norm.
    shapes = [(1, 8), (2, 16), (3, 24), (4, 32)]
    assert reached["parameters"].tolist() == [n * (12 * d * d + 13 * d) + 2 * d for n, d in shapes]
    removals = pd.read_csv(tmp_path / "study" / "removals.csv")
    assert set(removals["variant"]) == {"original", "norm-free"}
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Too few sizes came to the threshold" in page
    assert "Censored, and not in the fit: size 0.5 seed 0 (at most 576)" in page


def test_a_removal_that_diverges_is_a_result(
    normfree: Command, preset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    command = ("study", "norm-removal-scaling", "--preset", preset_file, "--out", "study")
    code, out, err = normfree(*command)
    assert code == 0, err
    assert "size 2 seed 0, 12 steps at 0.001: after a jump of the loss" in out
    removals = pd.read_csv(tmp_path / "study" / "removals.csv")
    assert removals.loc[removals["variant"] == "norm-free", "eval_loss"].isna().all()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "size 2 seed 0 (more than 768)" in page


@pytest.mark.parametrize(
    ("study", "change", "says"),
    [
        ("norm-removal", "removal.budget_shares=[0.1]", "takes its last norm out at step"),
        ("norm-removal", "removal.learning_rates=[0]", "removal.learning_rates.0: Input should be greater than 0"),
        ("norm-removal", "removal.rates=[1]", "unknown option 'removal.rates'"),
        ("norm-removal-scaling", "model.n_layer=3", "use even numbers"),
    ],
)
def test_bad_input_writes_nothing(
    normfree: Command, preset_file: Path, tmp_path: Path, study: str, change: str, says: str
) -> None:
    code, _, err = normfree("study", study, "--preset", preset_file, "--set", change, "--out", "study")
    assert (code, err.count("\n")) == (2, 1), err
    assert says in err
    assert not (tmp_path / "study").exists()
