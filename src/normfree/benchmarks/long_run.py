"""Hours of training with telemetry in every step: does the process stay as it was, and do its tables grow as predicted?

Trains the preset's baseline (SM+LN+G, seed 0) with ``normfree train``, reads the process from outside every few
seconds, and ends it with SIGTERM as a cluster would. The first tenth of the time predicts the rest: constant memory and
open files, and as many rows of telemetry a step and bytes a row.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from normfree.benchmarks.machine import check_positive, surroundings
from normfree.devices import default_device
from normfree.errors import InputError, RunFailedError
from normfree.locks import holds_nothing
from normfree.runner import load_preset, run_config
from normfree.studies.relu_revival import LAYERNORM_GELU
from normfree.training import RunConfig
from normfree.training.records import LAYERS_FILE

MOST_TOKENS_A_SECOND = 10_000_000
MIB = 2**20
STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that saved a checkpoint and ended on SIGTERM."""
LEAST_READINGS = 3
"""One for the prediction, and two for a line through the others."""
STANDARD_ERROR = 2


def benchmark_long_run(
    *,
    preset: str = "cpu",
    hours: float = 2.0,
    every: float = 20.0,
    run: Path | None = None,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Trains for ``hours`` and reads the process ``every`` seconds; progress of the training goes to standard error.

    Args:
        preset: its name, or a YAML file.
        run: run folder, kept; None means a temporary one.
        cache_dir: where tokenized corpora are kept; None means where ``normfree train`` keeps them.

    Returns:
        The figures, and all ``readings``.

    Raises:
        InputError: there is no such preset, an option is out of range, or there were too few readings.
        RunFailedError: the run ended by itself, or could not be ended.
    """
    check_positive(hours=hours, every=every)
    if run is not None and run.exists() and not (run.is_dir() and holds_nothing(run)):
        raise InputError(f"{run} exists and is not empty; give another folder with --run")
    config = _endless(preset, hours)
    with tempfile.TemporaryDirectory() as temporary:
        folder = run or Path(temporary) / "run"
        written = Path(temporary) / "endless.yaml"
        written.write_text(config.to_yaml({}))
        command = [sys.executable, "-m", "normfree", "train", str(written), "--out", str(folder)]
        if cache_dir is not None:
            command += ["--cache-dir", str(cache_dir)]
        readings = _watched(command, folder / LAYERS_FILE, 3600 * hours, every)
        found = summary(readings)
        layers = pq.read_table(folder / LAYERS_FILE, columns=["step"])["step"].to_numpy()
    steps = int(layers.max()) + 1
    return {
        **surroundings(default_device()),
        "rows_a_step": len(layers) / steps,
        "steps": steps,
        **found,
        "readings": readings,
    }


def summary(readings: list[dict[str, float]]) -> dict[str, float]:
    """Figures of the readings that found telemetry on disk.

    Raises:
        InputError: there are too few of them.
    """
    measured = [each for each in readings if each.get("telemetry_rows")]
    if len(measured) < LEAST_READINGS:
        raise InputError(
            f"telemetry was on disk in {len(measured)} of {len(readings)} looks at the run, and {LEAST_READINGS} are "
            "needed; give more --hours, or fewer seconds with --every"
        )
    n_first = max(len(measured) // 10, 1)
    first, later = measured[:n_first], measured[n_first:]
    last, predicted_bytes_a_row = later[-1], first[-1]["telemetry_bytes"] / first[-1]["telemetry_rows"]
    return {
        "hours": last["seconds"] / 3600,
        "telemetry_rows": last["telemetry_rows"],
        "telemetry_mib": last["telemetry_bytes"] / MIB,
        "telemetry_bytes_a_row": last["telemetry_bytes"] / last["telemetry_rows"],
        "telemetry_bytes_over_predicted": last["telemetry_bytes"] / (predicted_bytes_a_row * last["telemetry_rows"]),
        **{
            f"{name}_{when}": statistics.median(each[name] for each in part)
            for name in ("own_mib", "resident_mib", "open_files")
            for when, part in (("first_tenth", first), ("last_tenth", later[-len(first) :]))
        },
        **{f"{name}_largest": max(each[name] for each in measured) for name in ("own_mib", "open_files")},
        "own_mib_growth_an_hour": slope(later, "own_mib"),
        "open_files_growth_an_hour": slope(later, "open_files"),
    }


def slope(readings: list[dict[str, float]], name: str) -> float:
    """Least-squares growth of ``name`` in an hour."""
    return 3600 * statistics.linear_regression([r["seconds"] for r in readings], [r[name] for r in readings]).slope


def reading(process: psutil.Process, table: Path, start: float) -> dict[str, float]:
    """One reading of ``process``, and of its telemetry table once that exists; ``start`` in monotonic seconds."""
    memory = process.memory_full_info()
    read: dict[str, float] = {
        "seconds": time.monotonic() - start,
        "own_mib": memory.uss / MIB,
        "resident_mib": memory.rss / MIB,
        "open_files": process.num_fds(),
    }
    if table.exists():
        with table.open("rb") as file:  # training may replace it
            rows = pq.read_metadata(file).num_rows
            read |= {"telemetry_rows": rows, "telemetry_bytes": os.fstat(file.fileno()).st_size}
    return read


def _watched(command: list[str], table: Path, seconds: float, every: float) -> list[dict[str, float]]:
    """Readings of the run that ``command`` starts, until it is ended after ``seconds``."""
    readings = []
    start = time.monotonic()
    with subprocess.Popen(command, stdout=STANDARD_ERROR) as training:
        try:
            process = psutil.Process(training.pid)
            while time.monotonic() - start < seconds:
                time.sleep(every)
                if training.poll() is not None:
                    break
                readings.append(reading(process, table, start))
        finally:
            training.send_signal(signal.SIGTERM)  # also if this process is stopped: the run would never end
        code = training.wait()
    if code != STOPPED:
        raise RunFailedError(
            f"the run ended with code {code} after {time.monotonic() - start:.0f} seconds; "
            f"one that saves a checkpoint on SIGTERM ends with {STOPPED}"
        )
    return readings


def _endless(preset: str, hours: float) -> RunConfig:
    """The preset's baseline with telemetry in every step, longer than any machine trains in that time."""
    config = run_config(load_preset(preset), LAYERNORM_GELU, seed=0)
    tokens = int(max(hours, 1) * 3600 * MOST_TOKENS_A_SECOND)
    changed = {"telemetry_steps": 1, "tokens": tokens, "steps": None, "warmup_ratio": 0.0, "warmup_steps": None}
    return config.model_copy(update={"recipe": config.recipe.model_copy(update=changed)})
