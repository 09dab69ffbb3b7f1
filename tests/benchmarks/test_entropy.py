"""``normfree bench entropy``: what it reports of each length, and the memory of fresh processes."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from normfree.benchmarks import entropy, peak_memory

Command = Callable[..., tuple[int, str, str]]
MIB = 2**20
VARIANTS = ["eager", "entropy (cpu)", "entropy (chunked)", "attention", "attention + entropy"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing asks for Triton's interpreter, which other tests do."""
    monkeypatch.setattr(entropy, "default_device", lambda: entropy.CPU)
    monkeypatch.setattr(entropy, "_available_backends", lambda device: ["cpu", "chunked"])


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What fresh processes send, one after the other: bytes, or nothing (None), as they are killed."""
    outcomes: list[int | None] = []

    def process(*, args: tuple[Any, ...], **_: object) -> Mock:
        outcome = outcomes.pop(0)
        return Mock(start=lambda: None if outcome is None else args[0].send(outcome))

    context = Mock(Pipe=multiprocessing.Pipe, Process=process)
    monkeypatch.setattr(peak_memory, "get_context", lambda method: {"spawn": context}[method])
    return outcomes


def test_lengths(normfree: Command, outcomes: list[int | None], without_libraries: Path) -> None:
    # three processes a variant; the larger two of each are what an allocator happened to hold
    # next to nothing says that memory was reused: no ratio is made of it
    needed = [6 * MIB, 2 * MIB, 4096, MIB, 4 * MIB]
    outcomes += [n + more for n in needed for more in (MIB, 0, 5 * MIB)] + [MIB] * 12
    # eager's four matrices of 2 heads in float32: 2^11 bytes at 8 tokens, 2^13 at 16
    options = ("--tokens", "8,16", "--batch", 1, "--heads", 2, "--head-dim", 16, "--rounds", 1)
    limit = ("--eager-gib", 2**11 / 2**30)
    code, out, err = normfree("bench", "entropy", *options, *limit, "--out", "deep/e.json", "--json")
    assert code == 0
    result = json.loads(out)
    assert outcomes == []
    assert json.loads(Path("deep/e.json").read_text()) == result
    assert result["command"] == (
        "normfree bench entropy --tokens 8,16 --batch 1 --heads 2 --head-dim 16 --rounds 1 "
        f"--eager-gib {2**11 / 2**30} --out deep/e.json --json"
    )
    assert result["shape"] == {"batch": 1, "n_head": 2, "head_dim": 16}
    assert (result["device"], result["dtype"], result["auto_backend"]) == ("CPU, 1 threads", "fp32", "cpu")

    short, long = result["lengths"]
    assert (short["tokens"], long["tokens"]) == (8, 16)
    assert list(short["milliseconds"]) == VARIANTS
    assert all(each > 0 for each in short["milliseconds"].values())
    assert short["peak_mib"] == dict(zip(VARIANTS, [6.0, 2.0, 0.0, 1.0, 4.0], strict=True))
    assert short["eager_memory_over"] == {"entropy (cpu)": 3.0, "entropy (chunked)": None}
    for name, times in short["eager_time_over"].items():
        # one round: the ratio is that of the two medians, up to their rounding to 1e-4 ms
        expected = short["milliseconds"]["eager"] / short["milliseconds"][name]
        assert times == pytest.approx(expected, rel=0.05)
    assert short["attention_and_entropy_over_attention"] > 1

    assert list(long["milliseconds"]) == VARIANTS[1:], "without eager"
    assert set(long["eager_time_over"].values()) == set(long["eager_memory_over"].values()) == {None}
    assert "8 tokens" in err, "each length as it is measured, beside JSON on standard error"


def test_table(normfree: Command, outcomes: list[int | None]) -> None:
    outcomes += [3 * MIB] * 3 + [2 * MIB] * 12
    code, out, err = normfree("bench", "entropy", "--tokens", 8, "--heads", 1, "--rounds", 1)
    assert (code, err) == (0, "")
    rows = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}
    assert rows["eager"][-3:] == ["3.00", "–", "–"]
    assert rows["entropy (cpu)"][-3] == "2.00"
    assert rows["entropy (cpu)"][-1] == "1.5"


def test_a_process_that_is_killed(normfree: Command, outcomes: list[int | None]) -> None:
    outcomes += [MIB, None]
    code, out, err = normfree("bench", "entropy", "--tokens", 8, "--rounds", 1, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("normfree: the process that measured the memory of 'eager' at 8 tokens was killed")
    assert err.count("\n") == 1


def test_the_memory_of_a_fresh_process() -> None:
    # two float32 matrices of 4 heads and 1,024² at least, as ``p`` is made of the masked scores
    case = entropy._Case(batch=1, heads=4, head_dim=16, dtype="fp32", eager_gib=1.0)
    before, matrix = signal.getsignal(signal.SIGINT), 4 * 4 * 1024**2
    assert 2 * matrix < entropy._peak_in_fresh_process("eager", 1024, case) < 6 * matrix
    assert signal.getsignal(signal.SIGINT) is before
    assert multiprocessing.active_children() == []
