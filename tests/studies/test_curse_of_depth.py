"""The study of The Curse of Depth, from the command line to its page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from normfree.errors import InputError
from normfree.runner import load_preset, run_config
from normfree.studies.curse_of_depth import LNS, PRE_LN, configurations, depth_table
from normfree.training import load_pretrained

METHODS = 14


def test_study_measures_the_layers_of_every_method(
    normfree: Callable[..., tuple[int, str, str]],
    preset_file: Path,
    preset_content: dict[str, Any],
    tmp_path: Path,
) -> None:
    deeper = {**preset_content, "model": {**preset_content["model"], "n_layer": 3}}
    preset_file.write_text(yaml.safe_dump(deeper))
    code, out, err = normfree("study", "curse-of-depth", "--preset", preset_file, "--out", tmp_path / "depth", "--json")
    assert code == 0, err
    assert [row["configuration"] for row in json.loads(out)["table"]][:3] == [PRE_LN, "Pre-LN, scaled init", "Post-LN"]
    runs = sorted((tmp_path / "depth").glob("runs/*/seed-0"))
    assert len(runs) == METHODS
    skipped = pd.read_csv(tmp_path / "depth/runs/pre-ln/seed-0/depth/skipped_layers.csv")
    model = load_pretrained(str(tmp_path / "depth/runs/pre-ln/seed-0")).model
    sequences = torch.tensor(np.load(next((tmp_path / "cache").glob("*/eval.npy")))[:32].astype(np.int64))
    with torch.no_grad():
        plain = model(sequences, labels=sequences).loss.item()
        del model.model.blocks[1]
        without = model(sequences, labels=sequences, use_cache=False).loss.item()
    assert skipped.set_index("layer")["loss_increase_nats"][1] == pytest.approx(without - plain, abs=2e-5)
    page = (tmp_path / "depth/report.html").read_text(encoding="utf-8")
    assert "Published: evaluation perplexity on C4" in page
    assert "1,409.79" in page
    assert "A skipped layer of the deeper half costs" in page
    assert "before the first update" in page


def test_methods_differ_in_their_norms_only() -> None:
    preset = load_preset("depth-12")
    models = {
        each.label: run_config(preset, each, 0).build_model_config(preset.data.vocab_size)
        for each in configurations(preset)
    }
    assert models[LNS].norm == "rmsnorm_scaling"
    assert models[LNS].scale_residual_init is False
    assert models[f"{LNS}, scaled init"].scale_residual_init is True
    assert models["Mix-LN"].n_post_layer == 3
    assert models["HybridNorm*, scaled init"].norm_placement == "hybrid_star"
    assert models["HybridNorm*, scaled init"].scale_residual_init is True
    assert {each.final_norm for label, each in models.items() if not label.startswith("Dynamic ")} == {"rmsnorm"}
    assert len({(each.n_layer, each.n_embd, each.n_inner, each.ffn) for each in models.values()}) == 1


def test_a_preset_without_a_plain_norm_is_refused() -> None:
    preset = load_preset("depth-12").with_changes(**{"model.norm": "dyt"})
    with pytest.raises(InputError, match=r"model\.norm must be layernorm or rmsnorm, not 'dyt'"):
        configurations(preset)


def test_the_table_is_of_means_over_seeds() -> None:
    rows = [
        {"seed": seed, "effective_depth": depth, "deep_half_share": share, "variance_growth": law}
        for seed, depth, share, law in ((0, 4.0, 0.25, "linear"), (1, 6.0, 0.35, "linear"), (2, 5.0, 0.3, "power law"))
    ]
    summary = pd.DataFrame(rows).assign(
        configuration="a", n_layer=8, loss_nats=3.0, useful_layers=6, variance_ratio=2.0, deep_layer_nats=0.0125
    )
    (row,) = depth_table(summary).to_dict("records")
    assert row["Seeds"] == 3
    assert row["Effective depth"] == "5.00 ± 2.48"  # t(0.975, 2) = 4.303, s.d. 1
    assert row["Deep half's share, %"] == "30.00 ± 12.42"
    assert row["Deep layer, 10⁻³ nats"] == "12.50 ± 0.00"
    assert row["Variance grows"] == "linear (2), power law (1)"
