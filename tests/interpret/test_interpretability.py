from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from normfree.data import PackedData
from normfree.training import RunConfig, train

Command = Callable[..., tuple[int, str, str]]


def test_models_with_and_without_norms_on_one_page(
    normfree: Command, tiny_run: Callable[..., RunConfig], data: PackedData, corpus_folder: Path, tmp_path: Path
) -> None:
    train(tiny_run("SM+LN+G"), data, tmp_path / "with")
    train(tiny_run("SM+G", model={"norm": "none", "final_norm": "none"}), data, tmp_path / "without")
    arguments = [
        "--corpus",
        f"directory:{corpus_folder}",
        "--sequences",
        "12",
        "--neurons",
        "3",
        "--out",
        "page",
        "--json",
    ]
    code, out, err = normfree("interpret", tmp_path / "with", tmp_path / "without", *arguments)
    assert code == 0, err
    rows = {row["model"]: row for row in json.loads(out)["summary"]}
    assert rows["with"]["attribution_nmae"] > 0.01
    assert rows["without"]["attribution_nmae"] < 1e-4
    np.testing.assert_allclose(rows["without"]["norm_mediated_share"], 0.0, atol=1e-6)
    page = tmp_path / "page"
    assert {path.name for path in page.glob("*.csv")} == {
        "attribution_errors.csv",
        "patches.csv",
        "neuron_weights.csv",
        "neuron_effects.csv",
        "cumulative_ablation.csv",
        "sinks.csv",
        "residual_stds.csv",
        "summary.csv",
    }
    assert {path.stem for path in (page / "figures").glob("*.png")} == {
        "attribution-errors",
        "patching",
        "confidence-neurons",
        "cumulative-ablation",
        "residual-std",
    }
    effects = pd.read_csv(page / "neuron_effects.csv")
    assert effects.groupby("model").size().to_dict() == {"with": 3, "without": 3}
    together = pd.read_csv(page / "cumulative_ablation.csv").set_index("model")
    normed, without = together.loc["with"], together.loc["without"]
    assert normed["n_ablated"].tolist() == [0, 1, 2, 3]
    assert without["neuron"].tolist() == normed["neuron"].tolist(), "the first model's candidates"
    np.testing.assert_allclose(without["entropy_nats"], without["frozen_entropy_nats"], rtol=1e-6)
    assert 0 < rows["with"]["sink_query_share"] < 1
    text = (page / "report.html").read_text()
    assert "without: direct logit attribution misses the measured direct effect of a head by 0.0 %" in text
