"""What two runs have measured, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from normfree.training import load_pretrained

OF_THE_CLOCK = "tokens_per_second"


def rows(folder: Path) -> pd.Series:
    """Every row of telemetry by what it is of, without the readings of the clock."""
    metrics = pd.read_parquet(folder / "metrics.parquet").assign(layer=-1, head=-1)
    layers = pd.read_parquet(folder / "layers.parquet").fillna({"head": -1})
    both = pd.concat([metrics[metrics["name"] != OF_THE_CLOCK], layers])
    keys = ["name", "step", "layer", "head"]
    assert not both.duplicated(keys).any()
    return both.set_index(keys)["value"].sort_index()


def largest_differences(folder: Path, reference: Path) -> dict[str, float]:
    """By how much the values of each name differ at most; both runs must have the same rows."""
    ours, theirs = rows(folder), rows(reference)
    pd.testing.assert_index_equal(ours.index, theirs.index)
    assert ours.notna().all()
    return {str(name): value for name, value in (ours - theirs).abs().groupby(level="name").max().items()}


def assert_same_run(folder: Path, reference: Path, tolerance: float = 1e-4) -> dict[str, float]:
    """Losses, telemetry, evaluation and weights of two runs are the same within ``tolerance``."""
    differences = largest_differences(folder, reference)
    for name in ("train_loss", "eval_loss", "entropy_nats"):
        assert differences[name] <= tolerance, (name, differences)
    for name, value in differences.items():
        if name.endswith("_count"):
            assert value == 0, name
    for name in ("sequence_losses", "head_entropy"):
        pd.testing.assert_frame_equal(measured(folder, name), measured(reference, name), atol=tolerance)
    results, expected = (pd.read_csv(each / "results.csv") for each in (folder, reference))
    pd.testing.assert_frame_equal(results, expected, rtol=tolerance)
    ours, theirs = (load_pretrained(str(each)).model.state_dict() for each in (folder, reference))
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        # A bias that all keys share changes no attention: its gradient is rounding, which Adam makes as large as any.
        if key.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(weight, theirs[key], atol=10 * tolerance, rtol=10 * tolerance)
    return differences


def measured(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / f"{name}.parquet")


def trained_on(folder: Path) -> np.ndarray:
    """The steps that have a loss."""
    metrics = pd.read_parquet(folder / "metrics.parquet")
    return metrics.loc[metrics["name"] == "train_loss", "step"].to_numpy()
