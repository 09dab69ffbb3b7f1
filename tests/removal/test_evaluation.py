"""The models of a removal compared on several corpora, against predictions computed from the exported models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from transformers import AutoModelForCausalLM, AutoTokenizer

from normfree.data import corpus_sequences
from normfree.data.beginning import Beginning
from normfree.removal import evaluation
from normfree.training import load_pretrained

from .models import STOCK

Command = Callable[..., tuple[int, str, str]]
T = 12


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("code", "other")):
        (folder / name).mkdir()
        words = np.random.default_rng(seed).choice(["def", "return", "x", "y", "+", "for"], (90, 40))
        for number, row in enumerate(words):
            (folder / name / f"{number}.py").write_text(" ".join(row) + "\n")
    (folder / "short").mkdir()
    (folder / "short" / "a.py").write_text("x\n")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def command(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    base = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    model = STOCK["gpt2"]()
    model.resize_token_embeddings(270)
    model.save_pretrained(base)
    data = {"vocab_size": 270, "sequence_length": T, "eval_fraction": 0.3, "eval_tokens": 20 * T}
    recipe = {"steps": 12, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32"}
    values = [f"data.{name}={value}" for name, value in data.items()]
    values += [f"recipe.{name}={value}" for name, value in recipe.items()]
    options = [word for value in values for word in ("--set", value)]
    cache = ["--cache-dir", base.parent / "cache"]
    return ["remove-norm", base, "--corpus", corpora["code"], "--tokenizer", "train", *options, *cache, "--out", "out"]


def test_predictions_of_every_variant_on_every_corpus(
    normfree: Command,
    command: list[object],
    corpora: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = normfree(*command, "--eval-corpus", corpora["other"], "--eval-sequences", 20, "--json")
    assert code == 0, err
    read = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    own, other = f"directory:{corpora['code']}", f"directory:{corpora['other']}"
    variants = ["original", "vanilla", "norm-free"]
    assert read["corpus"].tolist() == [own] * 3 + [other] * 3
    assert read["model"].tolist() == variants * 2
    assert read["sequences"].tolist() == [20] * 6
    assert [row["model"] for row in json.loads(out)["evaluation"]] == variants * 2
    rows: Any = read.set_index(["corpus", "model"])

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "norm-free")
    sequences = corpus_sequences(other, tokenizer, T, 20, Beginning())
    models: dict[str, Any] = {
        "original": AutoModelForCausalLM.from_pretrained(str(command[1])),
        "vanilla": load_pretrained(str(tmp_path / "out" / "vanilla")).model,
        "norm-free": AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "norm-free"),
    }
    with torch.no_grad():
        p = {name: each.eval()(sequences).logits[:, :-1].double().softmax(-1).numpy() for name, each in models.items()}
    targets = sequences.numpy()[:, 1:, None]
    for name in variants:
        found = rows.loc[(other, name)]
        assert found["loss_nats"] == pytest.approx(-np.log(np.take_along_axis(p[name], targets, -1)).mean(), rel=1e-5)
        divergence = (jensenshannon(p["original"], p[name], axis=-1) ** 2).mean()
        assert found["jsd_nats"] == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    assert rows.loc[(other, "norm-free"), "jsd_nats"] > 1e-5

    def never(*_: object) -> None:
        raise AssertionError("what is there is measured again")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "compare_on", never)
        code, out, err = normfree(*command, "--eval-sequences", 20, "--json")
    assert code == 0, err
    assert len(json.loads(out)["evaluation"]) == 6
    code, _, err = normfree(*command, "--eval-sequences", 10)
    assert code == 0, err
    again = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    assert again["corpus"].tolist() == [other] * 3 + [own] * 3
    pd.testing.assert_frame_equal(again[:3], read[3:].reset_index(drop=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["code"], "is evaluated twice"),
        (["other", "other"], "is evaluated twice"),
        (["short"], "has no sequence of 12 tokens within one document"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_corpora_write_nothing(
    normfree: Command, command: list[object], corpora: dict[str, Path], tmp_path: Path, names: list[str], message: str
) -> None:
    options = [word for name in names for word in ("--eval-corpus", corpora.get(name, f"./{name}"))]
    code, _, err = normfree(*command, *options)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()
