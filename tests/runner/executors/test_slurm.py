"""SLURM through submitit: its local executor for the jobs themselves, programs in SLURM's place for the array."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from tests.faults.test_kill_and_resume import state_of

Command = Callable[..., tuple[int, str, str]]


def test_jobs_leave_what_one_process_does(
    study: Command, half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "normfree.runner.executors.slurm.engine", lambda folder: submitit.AutoExecutor(folder, cluster="local")
    )
    monkeypatch.setattr("normfree.runner.executors.slurm.SlurmExecutor.poll_seconds", 0.5)
    code, out, err = study("--executor", "slurm", "--executor-set", "gpus=0")
    assert code == 0, out + err
    assert out.count(": SLURM job ") == 2
    assert out.count(": finished on ") == 2
    assert state_of(half) == state_of(whole)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH in which sbatch keeps what it is given, and sacct says that it came to nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "srun": "exit 1",
        "sbatch": f'cp "$1" "{tmp_path}/submitted-$$.sh"; echo "Submitted batch job 4711"',
        "sacct": 'printf "JobID|State|NodeList\\n4711_[0-9]|NODE_FAIL|node-7\\n4711|NODE_FAIL|node-7\\n"',
        "scancel": "exit 1",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("normfree.runner.executors.slurm.SlurmExecutor.poll_seconds", 0.1)
    return tmp_path


def test_the_array_asks_for_what_is_wanted_and_a_lost_node_fails_its_runs(study: Command, cluster: Path) -> None:
    wanted = {
        "partition": "gpu",
        "account": "lab-7",
        "minutes": "90",
        "cpus": "6",
        "memory_gb": "24",
        "setup": "module load cuda",
        "sbatch.reservation": "paper",
    }
    options = [word for name, value in wanted.items() for word in ("--executor-set", f"{name}={value}")]
    code, out, err = study("--executor", "slurm", "--workers", "2", "--retries", "0", *options)
    assert code == 1, out + err
    (script,) = [path.read_text() for path in cluster.glob("submitted-*.sh")]
    lines = script.splitlines()
    for line in (
        "--array=0-3%2",
        "--partition=gpu",
        "--account=lab-7",
        "--time=90",
        "--cpus-per-task=6",
        "--mem=24GB",
        "--gpus-per-node=1",
        "--signal=USR2@120",
        "--reservation=paper",
    ):
        assert f"#SBATCH {line}" in lines, script
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if line.startswith("srun "))
    assert "normfree: 4 runs failed: runs/sm-ln-g/seed-0 (SLURM job 4711_0 ended with state NODE_FAIL; its log: " in err


def test_a_refusal_of_sbatch_is_one_line(study: Command, cluster: Path) -> None:
    (cluster / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1\n"
    )
    code, _, err = study("--executor", "slurm", "--executor-set", "partition=gpuu")
    assert code == 1
    assert "sbatch refused the jobs: sbatch: error: invalid partition specified: gpuu" in err.strip().splitlines()[-1]
