from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from normfree.data import Beginning, PackedData
from normfree.errors import InputError
from normfree.exports import export_without_layers
from normfree.interpret import (
    DepthMeasurement,
    TokenSequences,
    compare_depth,
    compare_interpretability,
    measure_depth,
    most_similar_block,
)
from normfree.interpret.depth.comparison import DepthComparison, depth_sections
from normfree.interpret.sequences import SequenceOptions
from normfree.training import RunConfig, train
from tests.interpret.depth.models import ours, stock, tokens
from tests.recorded_stages import recorded_stages
from tests.runner.test_bad_input import assert_refused

Command = Callable[..., tuple[int, str, str]]
FRAMES = {
    "residual_variance",
    "variance_growth",
    "angular_distance",
    "skipped_layers",
    "dropped_last",
    "jacobian_distance",
    "gradient_norms",
    "summary",
}
FIGURES = {"residual-variance", "angular-distance", "skipped-layers", "jacobian-and-gradients"}


@pytest.fixture(scope="module")
def run_folder(tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_run("SM+LN+G", model={"n_layer": 5}), data, tmp_path_factory.mktemp("depth") / "run").folder


def stock_folder(folder: Path, vocab_size: int) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).save_pretrained(folder)
    return folder


def test_a_run_and_a_stock_model_on_one_page(normfree: Command, run_folder: Path, tmp_path: Path) -> None:
    other = stock_folder(tmp_path / "llama", 290)
    arguments = ["--cache-dir", tmp_path / "cache", "--sequences", "6", "--probes", "2", "--out", "page"]
    code, out, err = normfree("depth", run_folder, other, *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)["models"]
    assert set(found) == {"run", "llama"}
    assert set(found["run"]) == FRAMES
    assert [len(found[name]["skipped_layers"]) for name in ("run", "llama")] == [5, 2]
    page = tmp_path / "page"
    assert {path.stem for path in page.glob("*.csv")} == FRAMES
    assert {path.stem for path in (page / "figures").glob("*.png")} == FIGURES
    summary = pd.read_csv(page / "summary.csv").set_index("model")
    loss = found["run"]["summary"][0]["loss_nats"]
    np.testing.assert_allclose(summary["loss_nats"]["run"], loss)
    skipped = pd.read_csv(page / "skipped_layers.csv").query("model == 'llama'")
    np.testing.assert_allclose(
        skipped["loss_nats"] - skipped["loss_increase_nats"], summary["loss_nats"]["llama"], rtol=1e-6
    )
    text = (page / "report.html").read_text()
    assert "of 5 layers; " in text
    assert "No law of growth for llama: a fit needs five layers" in text
    laws = text.partition("Laws of growth")[2].partition("</table>")[0]
    assert laws.count('<th scope="row">run</th>') == 4
    assert "llama" not in laws
    assert "NaN" not in laws
    assert text.count("data:image/png") == len(FIGURES)


def test_the_console_shows_a_row_a_model(normfree: Command, run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    code, out, err = normfree("depth", "run", "--cache-dir", tmp_path / "cache", "--sequences", "4")
    assert code == 0, err
    assert "effective depth" in out
    assert "Report: depth/run/report.html" in out


def test_a_diverged_model_ends_in_a_report(tmp_path: Path) -> None:
    broken = stock("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.bias.fill_(torch.inf)
    found = {"broken": measure_depth(broken, tokens(3, 8)), "whole": measure_depth(stock("llama"), tokens(3, 8))}
    compared = DepthComparison(found, TokenSequences(tokens(3, 8), Beginning()), {}, {})
    compared.write(tmp_path, "normfree depth")
    assert compared.summary.set_index("model")["nonfinite_entries"]["broken"] > 0
    text = (tmp_path / "report.html").read_text()
    assert "broken: the loss is not finite" in text
    assert "The residual stream of broken holds" in text


def test_sections_of_several_seeds_and_configurations(tmp_path: Path) -> None:
    measured: list[tuple[str, int, DepthMeasurement]] = [
        (norm, seed, measure_depth(ours(norm=norm), tokens(2, 8, seed=seed), n_probe=2))
        for norm in ("layernorm", "none")
        for seed in (0, 1)
    ]
    each = [found.frames(configuration=norm, seed=seed) for norm, seed, found in measured]
    frames = {name: pd.concat([one[name] for one in each], ignore_index=True) for name in FRAMES}
    sections = depth_sections(frames, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.pdf")} == FIGURES
    assert [len(section.elements) for section in sections] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("choice", "dropped"),
    [(("--drop", "3,1"), [1, 3]), (("--drop-last", "2"), [3, 4]), (("--drop-similar", "2"), None)],
)
def test_pruned_models_load(
    normfree: Command, run_folder: Path, tmp_path: Path, choice: tuple[str, str], dropped: list[int] | None
) -> None:
    options = ["--cache-dir", tmp_path / "cache", "--sequences", "4", "--out", "pruned", "--json"]
    code, out, err = normfree("prune-layers", run_folder, *choice, *options)
    assert code == 0, err
    result = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert result["n_layer"] == model.config.n_layer == 3
    assert result["parameters"] == model.num_parameters() < result["parameters_before"]
    assert result["tokenizer"]
    assert (tmp_path / "pruned" / "tokenizer.json").exists()
    if dropped is None:
        first, second = result["dropped_layers"]
        assert second == first + 1
    else:
        assert result["dropped_layers"] == dropped


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--drop", "0,1,2,3,4"), "cannot drop 5 of 5 layers"),
        (("--drop", "7"), "there is no layer 7 to drop; the model has layers 0 to 4"),
        (("--drop", "1,1"), "layer 1 is named twice"),
        (("--drop", "one"), "--drop 'one' is not a comma-separated list of numbers"),
        (("--drop-last", "5"), "cannot drop the last 5 of 5 layers"),
        (("--drop-similar", "5"), "cannot choose 5 of 5 layers"),
        (("--drop", "1", "--drop-last", "1"), "give exactly one of"),
        ((), "give exactly one of"),
        (("--drop", "1", "--corpus", "installed-python"), "are for --drop-similar"),
    ],
)
def test_bad_choices_of_layers(
    normfree: Command, run_folder: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    options = ["--cache-dir", tmp_path / "cache", "--sequences", "4", "--out", "pruned"]
    assert_refused(normfree, tmp_path, "prune-layers", run_folder, *arguments, *options, says=says)


def test_bad_models_to_measure(normfree: Command, run_folder: Path, tmp_path: Path) -> None:
    options = ["--cache-dir", tmp_path / "cache", "--sequences", "4"]
    small = stock_folder(tmp_path / "llama", 20)
    assert_refused(normfree, tmp_path, "depth", run_folder, small, *options, says="the vocabulary of LlamaForCausalLM")
    assert_refused(normfree, tmp_path, "depth", run_folder, run_folder, *options, says="named twice")
    assert_refused(normfree, tmp_path, "depth", run_folder, "--probes", "1", *options, says="at least 2 probes")
    assert_refused(normfree, tmp_path, "depth", small, *options, says="name a corpus to measure on")


def test_what_the_commands_do_is_a_function_that_returns_data(run_folder: Path, tmp_path: Path) -> None:
    options: SequenceOptions = {"n_sequences": 4, "cache_dir": tmp_path / "cache"}
    with recorded_stages() as stages:
        found = compare_depth({"mine": str(run_folder)}, n_probe=2, **options)
    assert found.summary["model"].tolist() == ["mine"]
    assert found.summary["n_layer"].tolist() == [5]
    assert f"depth of mine on {found.sequences}" in stages
    assert found.quantization == {}
    pruned = export_without_layers(str(run_folder), tmp_path / "pruned", drop_similar=2, **options)
    assert pruned.sequences is not None
    torch.testing.assert_close(pruned.sequences.tokens, found.sequences.tokens)
    assert pruned.dropped_layers == most_similar_block(found.models["mine"].angular_distance, 2)
    assert (pruned.n_layer, pruned.has_tokenizer) == (3, True)


def test_bad_choices_in_python_are_refused_as_by_the_commands(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model is named twice; name each once"):
        compare_depth([str(run_folder), str(run_folder)])
    with pytest.raises(InputError, match="no model is named"):
        compare_interpretability([])
    with pytest.raises(InputError, match="give exactly one of --drop, --drop-last and --drop-similar"):
        export_without_layers(str(run_folder), tmp_path / "pruned", drop=[1], drop_last=1)
    assert not (tmp_path / "pruned").exists()
