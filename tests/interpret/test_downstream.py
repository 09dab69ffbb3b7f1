"""examples/downstream.py: lm-eval's scores of our models are those of their logits, without a network."""

from __future__ import annotations

import ast
import json
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.interpret import tokenizer_of
from normfree.training import load_pretrained
from normfree.training.run_config import provenance

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "downstream.py"
ITEMS = [json.loads(line) for line in (ROOT / "examples/lm_eval/python_syntax.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In another folder than the repository, with an empty cache, and every connection an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the example needs no network")

    monkeypatch.chdir(tmp_path)
    # a list of the installed packages in the results: slower than all the rest
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def model(data: PackedData) -> NormfreeForCausalLM:
    """Random and opinionated: with the usual small weights all choices would be about equally likely."""
    torch.manual_seed(0)
    config = NormfreeConfig(
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_positions=512,
        vocab_size=data.statistics["vocab_size"],
        initializer_range=0.25,
        norm="none",
        activation="relu",
    )
    return NormfreeForCausalLM(config).eval()


@pytest.fixture
def run(model: NormfreeForCausalLM, data: PackedData, tiny_run, tmp_path: Path) -> Path:
    """A run folder whose last checkpoint is ``model``."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint-6"
    model.save_pretrained(checkpoint)
    data.tokenizer.save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 6}')
    (folder / "config.yaml").write_text(tiny_run().to_yaml(provenance(data)))
    return folder


def log_likelihoods(results: dict[str, Any]) -> np.ndarray:
    """[item, choice], nats: as lm-eval reports them."""
    samples = sorted(results["samples"]["python_syntax"], key=lambda sample: sample["doc_id"])
    return np.array([[request[0][0] for request in sample["resps"]] for sample in samples])


def expected_log_likelihoods(model: NormfreeForCausalLM, data: PackedData) -> np.ndarray:
    """[item, choice], nats: one sequence at a time, softmax in float64.

    As lm-eval defines it, the blanks that end a context belong to the choice.
    """
    table = np.empty((len(ITEMS), 4))
    for (i, choice), _ in np.ndenumerate(table):
        context = ITEMS[i]["context"]
        ids = data.tokenizer(context + ITEMS[i]["choices"][choice])["input_ids"]
        n_context = len(data.tokenizer(context.rstrip())["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().numpy()
        log_p = logits - logits.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        table[i, choice] = sum(log_p[t - 1, ids[t]] for t in range(n_context, len(ids)))
    return table


def test_only_the_labelled_choice_is_valid_python_and_no_label_is_commoner():
    for item in ITEMS:
        characters = {"".join(sorted("".join(choice.split()))) for choice in item["choices"]}
        assert len(characters) == 1, item
        for i, choice in enumerate(item["choices"]):
            if i == item["label"]:
                ast.parse(item["context"] + choice)
            else:
                with pytest.raises(SyntaxError):
                    ast.parse(item["context"] + choice)
    assert np.bincount([item["label"] for item in ITEMS]).tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_are_those_of_the_logits(example, model, data, run, batch_size):
    measured = load_pretrained(str(run))
    tokenizer = tokenizer_of(measured)
    results = example["evaluate"](measured, tokenizer, ["python_syntax"], batch_size=batch_size)

    reported = log_likelihoods(results)
    expected = expected_log_likelihoods(model, data)
    np.testing.assert_allclose(reported, expected, rtol=0, atol=1e-4)

    by_rank = np.sort(expected, axis=1)
    assert (by_rank[:, -1] - by_rank[:, -2]).min() > 1e-3, "no ties, or the accuracy would be a matter of rounding"
    accuracy = np.mean(expected.argmax(1) == [item["label"] for item in ITEMS])
    assert 0 < accuracy < 1
    assert results["results"]["python_syntax"]["acc,none"] == pytest.approx(accuracy, abs=1e-12)
    assert example["count_nan"](results["samples"]) == 0


def test_lm_eval_loads_a_checkpoint_by_its_path(model, data, run):
    results = simple_evaluate(
        "hf",
        model_args={"pretrained": str(run / "checkpoint-6"), "tokenizer": str(data.folder / "tokenizer")},
        tasks=["python_syntax"],
        task_manager=TaskManager(include_path=str(ROOT / "examples/lm_eval"), include_defaults=False),
        batch_size=7,
        device="cpu",
    )
    np.testing.assert_allclose(log_likelihoods(results), expected_log_likelihoods(model, data), rtol=0, atol=1e-4)


def test_command_prints_the_table(model, data, run, monkeypatch, capsys):
    command = [str(EXAMPLE), str(run), "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    accuracy = np.mean(expected_log_likelihoods(model, data).argmax(1) == [item["label"] for item in ITEMS])
    row = next(line.split("|") for line in printed.splitlines() if "python_syntax" in line)
    assert float(row[7]) == pytest.approx(accuracy, abs=5e-5)
    assert "NaN" not in printed


def test_nan_is_counted(model, data, run, monkeypatch, capsys):
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(run / "checkpoint-6")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(run)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "96 log-likelihoods are NaN" in capsys.readouterr().out


def test_a_model_without_a_tokenizer_is_one_line(run, monkeypatch, capsys):
    for file in (run / "checkpoint-6").glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(run)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert exit_info.value.code == 2
    assert "no tokenizer is saved with" in capsys.readouterr().err.splitlines()[-1]
