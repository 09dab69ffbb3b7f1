"""The curve of a removal: what is in its table, and that every removal that ends leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from normfree.removal.curve import loss_and_norms_gone, removal_curve
from normfree.removal.finetuning import recorded_removals
from normfree.removal.schedule import Removal

from .small_removals import corpus, gpt2

__all__ = ["corpus", "gpt2"]
Command = Callable[..., tuple[int, str, str]]
RATIO = "largest_std_over_median"


def run(folder: Path, **series: dict[int, float]) -> None:
    folder.mkdir(parents=True)
    rows = [(step, 10 * step, 0.0, name, value) for name, each in series.items() for step, value in each.items()]
    columns = ["step", "tokens", "wall_seconds", "name", "value"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "metrics.parquet")


def test_cross_entropy_is_the_loss_where_there_are_auxiliary_ones(tmp_path: Path) -> None:
    run(tmp_path / "vanilla", train_loss={1: 3.0, 2: 2.9}, eval_loss={2: 3.1})
    entropy, evaluated = {1: 3.2, 2: 3.3, 3: 3.4}, {2: 3.5}
    run(tmp_path / "removal", train_loss={1: 9.0, 2: 9.0, 3: 9.0}, cross_entropy_nats=entropy, eval_loss=evaluated)
    removals = [Removal(1, "ffn", 0), Removal(1, "attention_v", 0), Removal(2, "massive_tokens", None)]
    curve = removal_curve(tmp_path, removals)
    assert curve["variant"].tolist() == ["vanilla"] * 2 + ["norm-free"] * 3
    assert curve["train_loss"].tolist() == [3.0, 2.9, 3.2, 3.3, 3.4]
    np.testing.assert_array_equal(curve["eval_loss"], [np.nan, 3.1, np.nan, 3.5, np.nan])
    assert curve["parts_removed"].tolist() == [0, 0, 0, 2, 2]
    assert curve["tokens"].tolist() == [10, 20, 10, 20, 30]
    assert curve[RATIO].isna().all()


@pytest.mark.parametrize("has_ratio", [True, False])
def test_the_figure_shows_what_there_is(has_ratio: bool) -> None:
    curve = pd.DataFrame(
        {
            "variant": "norm-free",
            "step": [1, 2, 3],
            "tokens": [10, 20, 30],
            "parts_removed": [0, 1, 2],
            "train_loss": [3.0, 3.1, 3.2],
            "eval_loss": [np.nan, 3.0, 3.3],
            RATIO: [9.0, 3.0, 2.0] if has_ratio else np.nan,
        }
    )
    figure = loss_and_norms_gone(curve, original=2.9)
    above, below, *ratio = figure.axes
    evaluated, original = above.get_lines()
    np.testing.assert_array_equal(evaluated.get_xydata(), [[20, 3.0], [30, 3.3]])
    np.testing.assert_array_equal(original.get_ydata(), 2.9)
    np.testing.assert_array_equal(below.get_lines()[0].get_ydata(), [0, 1, 2])
    assert len(ratio) == has_ratio


SIZE: tuple[Any, ...] = ("--tokenizer", "train", "--set", "data.vocab_size=270", "--set", "data.sequence_length=24")
SIZE += ("--set", "data.eval_tokens=480")
SIZE += ("--set", "recipe.batch_size=4", "--set", "recipe.micro_batch_size=4", "--steps", "30")


def test_a_removal_leaves_its_curve(normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    code, _, err = normfree("remove-norm", gpt2, "--corpus", f"directory:{corpus}", *SIZE, "--out", "out")
    assert code == 0, err
    curve = pd.read_csv(tmp_path / "out" / "curve.csv")
    assert curve.groupby("variant").size().to_dict() == {"norm-free": 30, "vanilla": 30}
    assert curve["parts_removed"].max() == 10, "three layers with three readers each, and the final norm"
    assert curve[curve["variant"] == "norm-free"][RATIO].notna().all()
    assert (tmp_path / "out" / "figures" / "removal-curve.png").exists()


def test_a_removal_that_diverged_leaves_its_curve(normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    fast = ("--set", "recipe.learning_rate=1e4", "--no-vanilla")
    code, _, err = normfree("remove-norm", gpt2, "--corpus", f"directory:{corpus}", *SIZE, *fast, "--out", "out")
    assert code == 2
    assert "diverged" in err
    folder = tmp_path / "out"
    assert pd.read_csv(folder / "curve.csv")["variant"].unique().tolist() == ["norm-free"]
    assert (folder / "figures" / "removal-curve.png").exists()
    content = json.loads((folder / "removal" / "removal.json").read_text())
    assert len(recorded_removals(folder / "removal")) == len(content["removals"]) == 11
