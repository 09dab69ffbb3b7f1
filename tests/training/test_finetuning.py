import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.training import RunConfig, RunResult, load_pretrained, train
from normfree.training.finetuning import finetuning_run
from tests.data.test_pairs import PAIRS, write

QUICK = {"recipe.batch_size": 8, "recipe.precision": "fp32", "recipe.learning_rate": 0.01}


@pytest.fixture
def base(plain_run: RunResult) -> Path:
    return plain_run.folder


def finetuned(base: Path, folder: Path, **options: Any) -> tuple[RunConfig, PackedData]:
    corpus = {"data.corpus": f"pairs:{write(folder / 'pairs.jsonl', PAIRS)}", "data.eval_fraction": 0.2}
    changes = {**corpus, **QUICK, **options.pop("changes", {})}
    return finetuning_run(
        load_pretrained(str(base)), folder / "cache", changes=changes, **{"epochs": 2, "seed": 0, **options}
    )


def test_the_loss_is_that_of_the_completions_alone(base: Path, tmp_path: Path) -> None:
    run, data = finetuned(base, tmp_path)
    result = train(run, data, tmp_path / "run")
    model = load_pretrained(str(tmp_path / "run")).model
    total, count = 0.0, 0
    for index in range(len(data.eval)):
        item = data.eval[index]
        logits = model(item["input_ids"][None]).logits[0].detach().double().numpy()
        for place in range(1, len(item["labels"])):
            label = int(item["labels"][place])
            if label != -100:
                total -= log_softmax(logits[place - 1])[label]
                count += 1
    assert count < data.eval.tokens.size * 0.7
    np.testing.assert_allclose(result.row["eval_loss"], total / count, rtol=1e-5)


def test_it_goes_on_from_the_model_and_learns_the_completions(base: Path, tmp_path: Path) -> None:
    run, data = finetuned(base, tmp_path, epochs=6)
    assert run.recipe.steps == -(-6 * len(data.train) // 8)
    assert run.data.tokenizer == str(base / "checkpoint-6")
    train(run, data, tmp_path / "run")
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    losses = metrics[metrics["name"] == "train_loss"]["value"].to_numpy()
    assert losses[-1] < 0.7 * losses[0]


def test_budgets_and_low_rank_changes(base: Path, tmp_path: Path) -> None:
    run, _ = finetuned(base, tmp_path, changes={"recipe.steps": 3}, lora_rank=2)
    assert run.recipe.steps == 3
    assert run.lora is not None
    assert run.lora.rank == 2


def test_bad_input_is_one_line(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name what to fine-tune on with --corpus"):
        finetuning_run(load_pretrained(str(base)), tmp_path, changes={}, epochs=1, seed=0)
    with pytest.raises(InputError, match=r"unknown option 'model\.n_layer'"):
        finetuned(base, tmp_path, changes={"model.n_layer": 3})
    with pytest.raises(InputError, match="learning_rate"):
        finetuned(base, tmp_path, changes={"recipe.learning_rate": -1})


def test_the_command(base: Path, tmp_path: Path, normfree: Callable[..., Any]) -> None:
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    options = [f"--set={name}={value}" for name, value in {**QUICK, "data.eval_fraction": 0.2}.items()]
    code, out, err = normfree(
        "finetune", base, "--corpus", f"pairs:{pairs}", "--out", tmp_path / "out", "--steps", 2, "--json",
        "--cache-dir", tmp_path / "cache", *options,
    )  # fmt: skip
    assert code == 0, err
    row = json.loads(out)
    assert row["status"] == "finished"
    assert row["steps"] == 2
