"""What means nothing, is unknown or is not installed is one line and exit code 2, before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--executor", "slrum"), "unknown executor 'slrum' (did you mean 'slurm'?); allowed: local, slurm, ray"),
        (("--executor-set", "gpus=1"), "--executor-set means nothing without --workers"),
        (("--retries", "3"), "--retries means nothing without --workers"),
        (("--workers", "0"), "Invalid value for '--workers'"),
        (("--workers", "2", "--executor-set", "gpus"), "--executor-set 'gpus' is not of the form NAME=VALUE"),
        (("--workers", "2", "--executor-set", "partition=a"), "unknown option 'partition'; allowed: gpus, cpus"),
        (("--workers", "2", "--executor-set", "gpus=8"), "gpus: Input should be less than or equal to 1 (given: 8)"),
        (("--workers", "2", "--executor-set", "cpus=[1"), "--executor-set cpus: '[1' is not a YAML value"),
        (("--workers", "3", "--executor-set", "gpus=0.5"), "3 workers with 0.5 of a GPU each need more than the 1 GPU"),
        (("--executor", "slurm", "--executor-set", "partitoin=a"), "(did you mean 'partition'?)"),
        (("--executor", "slurm", "--executor-set", "minutes=soon"), "minutes: Input should be a valid integer"),
        (("--device", "gpu"), "unknown device 'gpu'; give cpu, cuda or cuda:N"),
        (("--executor", "slurm", "--device", "gpu"), "unknown device 'gpu'; give cpu, cuda or cuda:N"),
        (
            ("--executor", "slurm", "--device", "cuda:1"),
            "each worker has a GPU of its own; give --device cuda",
        ),
        (("--device", "cuda"), "torch finds no CUDA device here"),
        (("--workers", "1", "--device", "cuda"), "torch finds no CUDA device here"),
        (("--executor", "slurm"), "--executor slurm: srun is not on PATH"),
        (("--executor", "ray", "--executor-set", "address=127.0.0.1:1"), "no cluster at 127.0.0.1:1 ([Errno 111] Conn"),
        (("--executor", "ray", "--executor-set", "address=head:ray"), "no cluster at head:ray (invalid literal"),
    ],
)
def test_refused(
    study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    code, out, err = study(*arguments)
    assert code == 2, (out, err)
    assert says in err
    assert err.strip().splitlines()[-1].startswith("normfree: ")
    assert "Traceback" not in out + err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("executor", "module"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_executor_that_is_not_installed_names_the_extra(
    study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = study("--executor", executor)
    assert code == 2
    assert f"which is not installed: pip install 'normfree[{executor}]'" in err
    assert not (tmp_path / "study").exists()
