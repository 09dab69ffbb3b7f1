"""The study of learnable slopes from the command line: sixteen configurations, and what the page says of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from normfree import NormfreeForCausalLM
from normfree.runner import StudyFolder, load_preset, run_config
from normfree.studies.learnable_slopes import LEARNABLE, STUDY, initial_slope_columns
from normfree.training import load_run_config
from normfree.training.records import LAYERS_FILE
from normfree.training.run_folder import last_checkpoint

Command = Callable[..., tuple[int, str, str]]


def test_the_configurations_vary_sharing_decay_and_start_apart() -> None:
    preset = load_preset("smoke")
    runs = {each.label: run_config(preset, each, seed=0) for each in STUDY.configurations(preset)}
    assert len(runs) == 20
    assert len({each.slug for each in STUDY.configurations(preset)}) == 20
    for label, (sharing, initial, decayed) in LEARNABLE.items():
        run = runs[label]
        model = NormfreeForCausalLM(run.build_model_config(512))
        slopes = [block.ffn.activation.negative_slope for block in model.model.blocks]
        assert len({id(slope) for slope in slopes}) == (1 if sharing == "global" else len(slopes))
        assert all(slope.item() == np.float32(initial) for slope in slopes)
        assert run.recipe.decay_slopes == decayed
        assert not any("norm" in name for name, _ in model.model.blocks.named_parameters())


def test_initial_slopes_have_columns_where_no_panel_is_missing() -> None:
    every = list(LEARNABLE)
    assert initial_slope_columns(every) == 4
    assert initial_slope_columns(every[:8:4]) == 1
    pairs = ["layerwise 0.01", "layerwise 0.25", "layerwise 0.01, no decay", "layerwise 0.25, no decay"]
    assert initial_slope_columns(pairs) == 2
    assert initial_slope_columns(pairs[:3]) is None
    assert initial_slope_columns(["layerwise 0.01", "global 0.25"]) is None


def test_the_page_shows_the_slopes_that_the_runs_end_with(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    options = ("--set", "recipe.steps=2", "--set", "recipe.learning_rate=0.01")
    code, out, err = normfree("study", "learnable-slopes", "--preset", preset_file, "--out", "study", *options)
    assert code == 0, err
    folder = StudyFolder.open(tmp_path / "study")
    page = (folder.path / "report.html").read_text()
    for name in ("negative-slopes", "layerwise-entropy-six", "trajectory-distance"):
        assert (folder.path / "figures" / f"{name}.pdf").exists()
    run = folder.path / "runs" / "layerwise-0.25-no-decay" / "seed-0"
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    weights = load_file(checkpoint / "model.safetensors")
    final = [weights[f"model.blocks.{layer}.ffn.activation.negative_slope"].item() for layer in range(2)]
    layers = pd.read_parquet(run / LAYERS_FILE).query("name == 'negative_slope'")
    assert layers.loc[layers["step"] == 2, "value"].tolist() == final
    assert f"{np.mean(final):+.4f}" in page
    assert "layerwise 0.25, no decay" in out
    assert not load_run_config(run / "config.yaml").recipe.decay_slopes

    # From the same weights, the slopes that decay and those that do not part by η λ slope a step: AdamW's decay is
    # apart from the gradient.
    ends = {}
    for label in ("layerwise-0.25", "layerwise-0.25-no-decay"):
        layers = pd.read_parquet(folder.path / "runs" / label / "seed-0" / LAYERS_FILE)
        ends[label] = layers.query("name == 'negative_slope' and step == 2")["value"].to_numpy()
    rates = pd.read_parquet(folder.path / "runs" / "layerwise-0.25" / "seed-0" / "metrics.parquet")
    first, second = rates.query("name == 'learning_rate'").sort_values("step")["value"]
    shrunk = 0.25 * (1 - (1 - 0.1 * first) * (1 - 0.1 * second))
    np.testing.assert_allclose(ends["layerwise-0.25-no-decay"] - ends["layerwise-0.25"], shrunk, rtol=0.2)


def test_a_part_says_nothing_of_what_is_not_trained(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    only = ("--only", "layerwise 0.25, no decay")
    assert normfree("study", "learnable-slopes", "--preset", preset_file, "--out", "study", *only)[0] == 0
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Without weight decay on the slopes, 0 of 1 configurations" in page
    assert "With weight decay on the slopes" not in page
    assert "0 of 0" not in page
