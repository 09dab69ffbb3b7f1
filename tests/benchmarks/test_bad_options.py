"""A bad option of a benchmark gives one line that names it, exit code 2, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from normfree.benchmarks import entropy, sparse_decode

Command = Callable[..., tuple[int, str, str]]


def assert_refused(command: Command, folder: Path, *arguments: str, says: str) -> None:
    before = set(folder.rglob("*"))
    code, out, err = command("bench", *arguments, "--json")
    assert (code, out) == (2, ""), (out, err)
    assert err.startswith("normfree: ")
    assert err.count("\n") == 1
    assert says in err
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("entropi",), "No such command 'entropi'. Did you mean 'entropy'?"),
        (("entropy", "--tokens", "512;1024"), "--tokens '512;1024' is not a comma-separated list of numbers, e.g. 512"),
        (("entropy", "--tokens", "512,0"), "tokens is 0; it must be at least 1"),
        (("entropy", "--tokens", ""), "--tokens '' is not a comma-separated list"),
        (("entropy", "--dtype", "fp8"), "unknown dtype 'fp8' (did you mean 'fp32'?); allowed: fp32, bf16, fp16"),
        (("entropy", "--rounds", "0"), "rounds is 0; it must be at least 1"),
        (("entropy", "--out", "."), "is a folder; give the name of a file"),
        (("training", "--preset", "gpuu"), "unknown preset 'gpuu' (did you mean 'gpu'?)"),
        (("training", "--preset", "none.yaml"), "cannot read none.yaml"),
        (("training", "--steps", "0"), "steps is 0; it must be at least 1"),
        (("training", "--steps", "many"), "Invalid value for '--steps'"),
        (("step-cost",), "Missing argument 'group'"),
        (("step-cost", "norm"), "unknown group 'norm' (did you mean 'norms'?); allowed: norms, spark"),
        (("step-cost", "norms", "--only", "pre, dy"), "unknown variant 'pre, dy' (did you mean 'pre, dyt'?)"),
        (("step-cost", "spark", "--only", "pre, dyt"), "unknown variant 'pre, dyt'; allowed: dense, "),
        (("step-cost", "norms", "--dtype", "fp16"), "unknown dtype 'fp16' (did you mean 'bf16'?); allowed: fp32, bf16"),
        (("step-cost", "norms", "--rounds", "1"), "rounds is 1; it must be at least 2"),
        (("step-cost", "norms", "--heads", "0"), "heads is 0; it must be at least 1"),
        (("norm-free-inference", "--tokens", "0"), "tokens is 0; it must be at least 1"),
        (("norm-free-inference", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("sparse-decode", "fnn"), "unknown subject 'fnn' (did you mean 'ffn'?); allowed: ffn, model"),
        (("sparse-decode", "ffn", "--layers", "2"), "--layers is for sparse-decode model, not for ffn; leave it out"),
        (("sparse-decode", "ffn", "--threads", "one"), "--threads 'one' is not a comma-separated list"),
        (("sparse-decode", "ffn", "--threads", "1,0"), "threads is 0; it must be at least 1"),
        (("sparse-decode", "ffn", "--dtype", "fp16"), "unknown dtype 'fp16'"),
        (("sparse-decode", "ffn", "--width", "1"), "width is 1; it must be at least 2"),
        (("sparse-decode", "model", "--inner", "0"), "inner is 0; it must be at least 1"),
        (("pipeline", "packin"), "unknown subject 'packin' (did you mean 'packing'?); allowed: start, packing, "),
        (("pipeline", "--preset", "smoky"), "unknown preset 'smoky' (did you mean 'smoke'?)"),
        (("pipeline", "depth", "--probes", "1"), "probes is 1; it must be at least 2"),
        (("pipeline", "depth", "--tokens", "7"), "tokens is 7; it must be at least 8"),
        (("pipeline", "--rounds", "0"), "rounds is 0; it must be at least 1"),
        (("long-run", "--preset", "smoky"), "unknown preset 'smoky' (did you mean 'smoke'?)"),
        (("long-run", "--hours", "0"), "hours is 0.0; it must be a finite number above 0"),
        (("long-run", "--hours", "inf"), "hours is inf; it must be a finite number above 0"),
        (("long-run", "--every", "nan"), "every is nan; it must be a finite number above 0"),
    ],
)
def test_bad_options(normfree: Command, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    assert_refused(normfree, tmp_path, *arguments, says=says)


def test_a_run_folder_that_is_not_empty(normfree: Command, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").touch()
    assert_refused(normfree, tmp_path, "long-run", "--run", "there", says="there exists and is not empty")


def test_kernels_that_were_not_compiled(normfree: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_decode, "decode_backends", lambda: {"cpu": "there is no compiler"})
    says = "the cpu kernels of sparse decode cannot be used: there is no compiler"
    assert_refused(normfree, tmp_path, "sparse-decode", "ffn", says=says)


def test_a_system_that_does_not_tell_the_peak(
    normfree: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy, "default_device", lambda: entropy.CPU)
    monkeypatch.setattr(entropy, "MEMORY_RESET", tmp_path / "clear_refs")
    assert_refused(normfree, tmp_path, "entropy", says="which only Linux has")
