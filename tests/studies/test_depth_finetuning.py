"""Pre-trained pairs fine-tuned on the same prompts: what is compared, and that the study does it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from normfree.runner import load_study
from normfree.studies.depth_finetuning import formatted, gains
from normfree.training import load_pretrained
from normfree.training.finetuning import finetuning_run
from tests.data.made_up import write_documents

Command = Callable[..., tuple[int, str, str]]


def losses() -> pd.DataFrame:
    rows = [
        ("Pre-LN", 0, 3.0, 2.5, 2.0),
        ("Pre-LN", 1, 3.2, 2.6, 2.2),
        ("LayerNorm Scaling", 0, 2.9, 2.3, 1.95),
        ("LayerNorm Scaling", 1, 3.0, 2.5, 2.05),
    ]
    return pd.DataFrame(rows, columns=["configuration", "seed", "eval_loss", "before", "after"])


def test_a_gain_is_against_the_same_seed() -> None:
    (row,) = gains(losses()).to_dict("records")
    assert (row["configuration"], row["seeds"]) == ("LayerNorm Scaling", 2)
    for name, differences in {"eval_loss": (0.1, 0.2), "before": (0.2, 0.1), "after": (0.05, 0.15)}.items():
        assert row[name].mean == pytest.approx(np.mean(differences))
        half = 12.706204736 * abs(differences[1] - differences[0]) / 2  # t(0.975, 1) and the error of two values
        assert row[name].high - row[name].mean == pytest.approx(half)
    table = formatted(losses()).set_index("Configuration")
    assert str(table.loc["Pre-LN", "Pre-training"]).startswith("3.100 ± ")
    assert str(table.loc["gain of LayerNorm Scaling", "Completions, after"]).startswith("+0.100 ± ")


def test_a_seed_of_one_alone_is_no_pair() -> None:
    (row,) = gains(losses().iloc[[0, 1, 3]]).to_dict("records")
    assert row["seeds"] == 1
    assert row["after"].mean == pytest.approx(0.15)


@torch.no_grad()
def loss_of_completions(run: Path, study: Path) -> float:
    """Of a pre-trained run on the held-out pairs, by torch's cross-entropy."""
    loaded = load_pretrained(str(run))
    changes = {"data.corpus": f"pairs:{study / 'pairs' / 'pairs.jsonl'}", "recipe.steps": 1}
    _, data = finetuning_run(loaded, study / "pairs" / "tokens", changes=changes, epochs=1, seed=0)
    tokens, labels = data.eval.whole()
    logits = loaded.model.eval()(input_ids=tokens).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).item()


def test_every_run_is_fine_tuned_once_on_the_same_pairs(
    normfree: Command, preset_content: dict[str, Any], tmp_path: Path
) -> None:
    functions = [
        f'def f{i}(x):\n    """Adds {i} to x, {i % 7} times."""\n    for _ in range({i % 7}):\n        x += {i}\n\n\n'
        for i in range(400)
    ]
    folder = tmp_path / "code"
    folder.mkdir()
    write_documents(folder, {f"{i}.py": "".join(functions[8 * i : 8 * i + 8]) for i in range(50)})
    data = {**preset_content["data"], "corpus": f"directory:{folder}", "train_tokens": 2048}
    recipe = {**preset_content["recipe"], "steps": 12, "eval_steps": 12, "save_steps": 12}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**preset_content, "data": data, "recipe": recipe}))
    command = ("study", "depth-finetuning", "--preset", "tiny.yaml", "--out", "study", "--seeds", "0")
    code, _, err = normfree(*command)
    assert code == 0, err
    study = tmp_path / "study"
    runs = sorted(path.parent for path in study.glob("runs/*/*/finetuned.csv"))
    assert len(runs) == 3
    for run in runs:
        found = pd.read_csv(run / "finetuned.csv").iloc[0]
        tuned = pd.read_csv(run / "finetuned" / "results.csv").iloc[0]
        assert tuned["steps"] == 3
        assert found["after"] == pytest.approx(tuned["eval_loss"])
        assert found["before"] == pytest.approx(loss_of_completions(run, study), rel=1e-5)
        assert found["before"] != found["after"]
    page = (study / "report.html").read_text()
    assert "LayerNorm Scaling gains " in page
    times = {path: path.stat().st_mtime_ns for path in study.glob("runs/*/*/finetuned.csv")}
    assert normfree(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert load_study(study).table["configuration"].tolist() == ["Pre-LN", "Pre-LN, scaled init", "LayerNorm Scaling"]


def test_a_corpus_without_functions_is_refused_before_training(
    normfree: Command, preset_file: Path, tmp_path: Path
) -> None:
    code, _, err = normfree("study", "depth-finetuning", "--preset", preset_file, "--out", "no")
    assert (code, "has no Python functions with docstrings" in err) == (2, True)
    assert not list((tmp_path / "no").rglob("config.yaml"))
