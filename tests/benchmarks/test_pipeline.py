"""``normfree bench pipeline`` at sizes that take no time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree.benchmarks import pipeline

Command = Callable[..., tuple[int, str, str]]
SMALL = {"vocab_size": 64, "n_embd": 12, "n_inner": 16, "n_head": 3, "n_kv_head": 1, "n_positions": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, preset_file: Path) -> None:
    monkeypatch.setattr(pipeline, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(pipeline, "LLAMA_135M", {**pipeline.LLAMA_135M, **SMALL})
    monkeypatch.setattr(pipeline, "PEAK_SIZE", 64)
    monkeypatch.setattr(pipeline, "COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(pipeline, "DOCUMENT_BYTES", 20_000)
    monkeypatch.setattr(pipeline, "CORPUS", f"directory:{Path(pipeline.__file__).parents[1]}:**/*.py")
    # Starts of Python take seconds; what they import is tested by test_startup.py.
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: time.sleep(0.01))
    monkeypatch.setattr(pipeline, "REPORTED", "relu-revival")
    monkeypatch.setattr(pipeline, "REPORTED_PRESET", str(preset_file))
    monkeypatch.setattr(pipeline, "REPORTED_SEEDS", (0,))
    monkeypatch.setattr(pipeline, "REPORTED_STEPS", 1)


def test_every_subject_is_measured_against_its_limit(normfree: Command) -> None:
    options = ("--preset", "smoke", "--layers", 2, "--sequences", 2, "--tokens", 8, "--rounds", 1)
    code, out, err = normfree("bench", "pipeline", *options, "--json", "--out", "p.json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert json.loads(Path("p.json").read_text()) == result
    assert list(result["subjects"]) == list(pipeline.TASKS)
    for subject, found in result["subjects"].items():
        assert all(seconds > 0 for seconds in found["seconds"].values())
        if subject != "report":
            limit = found["limit"]
            assert found["time_over_limit"].keys() == found["seconds"].keys() - {limit}
            # One round: every ratio is that of the seconds, but for their digits.
            for name, ratio in found["time_over_limit"].items():
                assert ratio == pytest.approx(found["seconds"][name] / found["seconds"][limit], rel=0.1)
    assert "report of 4 runs" in result["subjects"]["report"]["seconds"]
    rates = result["subjects"]["checkpoint"]["megabytes_a_second"]
    assert rates.keys() == {"checkpoint", "plain write"}
    assert min(result[name] for name in ("matmul_fp32_gflops", "matmul_bf16_gflops", "copied_gigabytes_a_second")) > 0


def test_the_table_has_a_row_for_each_call(normfree: Command) -> None:
    options = ("--preset", "smoke", "--layers", 2, "--tokens", 8, "--rounds", 1)
    code, out, err = normfree("bench", "pipeline", "evaluation", "depth", *options)
    assert code == 0, err
    assert out.count("evaluation") == 2
    assert "bare" in out
    assert "GFLOP/s" in out
