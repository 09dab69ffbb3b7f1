"""The command from models to page, with a formula in the engine's place: a byte a number, two messages a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from normfree.data import PackedData
from normfree.training import RunConfig, train
from normfree_private.costs import measure_private_costs
from normfree_private.measurement import Cost, Measurer
from normfree_private.operations import Operation

Command = Callable[..., tuple[int, str, str]]


def numbers(operation: Operation) -> int:
    return sum(prod(shape) for shape in operation.shapes)


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An engine whose parties send one byte for each number of an operation, in two messages."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"spu": "0.9.5"}\'\n')
    python.chmod(0o755)
    monkeypatch.setenv("NORMFREE_ENGINE_PYTHON", str(python))

    def cost(measurer: Measurer, bytes_sent: int, messages: int) -> Cost:
        n = measurer.settings.protocol.n_party
        return Cost((bytes_sent,) * n, (messages,) * n, 0.5)

    def operations(self: Measurer, wanted: Any) -> dict[Operation, Cost]:
        return {each: cost(self, numbers(each), 2) for each in wanted}

    monkeypatch.setattr(Measurer, "operations", operations)
    monkeypatch.setattr(Measurer, "programs", lambda self, programs: [cost(self, 1000, 10) for _ in programs])


def test_presets_are_the_four_configurations(normfree: Command, formula: None, tmp_path: Path) -> None:
    code, out, err = normfree("private-cost", "paper-gpt2-128", "--blocks-only", "--no-alternatives", "--json")
    assert code == 0, err
    found = json.loads(out)
    totals = {(row["model"], row["protocol"], row["part"]): row for row in found["totals"]}
    assert {key[0] for key in totals} == {"SM+LN+G", "SM+LN+R", "SM+G", "SM+R"}
    T, d, inner, heads = 128, 768, 3072, 12
    attention = 4 * (T * d + d * d) + 2 * T * d + heads * T * T + heads * T * T + T * d
    feed_forward = (T * d + d * inner) + T * inner + (T * inner + inner * d)
    norms = 2 * (T * d + 2 * d)
    block = totals["SM+LN+G", "SEMI2K", "block 0"]
    assert block["bytes_sent"] == attention + feed_forward + norms
    assert block["norm_percent"] == pytest.approx(100 * norms / (attention + feed_forward + norms))
    assert block["messages_sent"] == 2 * 12
    assert block["WAN_seconds"] == pytest.approx(24 * 0.020 + 8 * block["bytes_sent"] / 100e6)
    assert block["norm_messages_sent_percent"] == pytest.approx(100 * 4 / 24)
    assert totals["SM+R", "ABY3", "blocks"]["bytes_sent"] == 12 * (attention + feed_forward)
    assert totals["SM+R", "ABY3", "blocks"]["norm_percent"] == 0
    assert "alternatives" not in found
    assert pd.read_csv(tmp_path / found["folder"] / "operations.csv").groupby(["model", "protocol"]).size().min() == 120


def test_runs_bring_their_perplexity(
    normfree: Command,
    formula: None,
    tiny_run: Callable[..., RunConfig],
    data: PackedData,
    tmp_path: Path,
) -> None:
    train(tiny_run("SM+LN+G"), data, tmp_path / "with")
    train(tiny_run("SM+R", model={"norm": "none", "activation": "relu"}), data, tmp_path / "without")
    code, out, err = normfree(
        "private-cost", tmp_path / "with", tmp_path / "without", "--json", "--network", "here=8,0"
    )
    assert code == 0, err
    found = json.loads(out)
    whole = {row["model"]: row for row in found["totals"] if row["part"] == "model" and row["protocol"] == "ABY3"}
    for model, folder in (("SM+LN+G", "with"), ("SM+R", "without")):
        perplexity = pd.read_csv(tmp_path / folder / "results.csv")["eval_ppl"][0]
        assert whole[model]["eval_ppl"] == pytest.approx(perplexity)
        assert whole[model]["here_seconds"] == pytest.approx(whole[model]["bytes_sent"] / 1e6)
    blocks = {row["model"]: row for row in found["blocks"] if row["protocol"] == "SEMI2K"}
    summed = blocks["SM+R"]["sum_bytes_sent"]
    assert blocks["SM+R"]["difference_percent"] == pytest.approx(100 * (summed / 1000 - 1))
    page = tmp_path / found["folder"]
    assert {path.stem for path in (page / "figures").glob("*.png")} == {
        "private-operations",
        "private-pareto",
        "private-alternatives",
    }
    text = (page / "report.html").read_text()
    assert "two semi-honest parties and a trusted dealer; online cost only" in text
    assert "messages · one-way delay + 8 · bytes / bandwidth" in text
    assert "here: 8 Mbit/s, 0 ms one way" in text


def test_a_notebook_gets_the_tables_of_the_command(normfree: Command, formula: None, tmp_path: Path) -> None:
    costs = measure_private_costs({"cpu": "cpu"}, sequence_length=16, cache_dir=tmp_path)
    assert list(costs.frames()) == ["operations", "totals", "blocks", "alternatives"]
    assert (costs.engine_version, costs.quantization, set(costs.sequence_lengths)) == ("0.9.5", {}, {16})
    code, out, err = normfree("private-cost", "cpu", "--sequence-length", 16, "--json")
    assert code == 0, err
    found = json.loads(out)
    for name, frame in costs.frames().items():
        assert json.loads(frame.to_json(orient="records", double_precision=9)) == found[name]


def test_a_run_is_measured_at_its_own_length_or_another(
    normfree: Command, formula: None, tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path: Path
) -> None:
    train(tiny_run("SM+LN+G"), data, tmp_path / "run")
    for arguments, length in (([], 16), (["--sequence-length", "8"], 8)):
        code, out, _ = normfree("private-cost", "run", "--no-alternatives", "--json", *arguments)
        assert code == 0
        softmax = next(row for row in json.loads(out)["operations"] if row["name"] == "softmax")
        assert softmax["shapes"] == f"[2, {length}, {length}]"
    code, _, err = normfree("private-cost", "run", "--sequence-length", "17")
    assert code == 2
    assert "has 16 positions; lower --sequence-length 17" in err


def test_models_of_one_name_are_refused(normfree: Command, formula: None) -> None:
    code, _, err = normfree("private-cost", "cpu", "cpu")
    assert code == 2, err
    assert err == "normfree: cpu is given twice; give each model once\n"
