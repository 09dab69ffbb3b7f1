"""Hours of training with telemetry in every step: does the process stay as it was, and do its tables grow as predicted?

    python benchmarks/long_run.py --hours 2 --out benchmarks/results/long_run-cpu.json

Trains the preset's baseline (SM+LN+G, seed 0) with ``normfree train`` for that time, watches the process from outside
every ``--every`` seconds, and ends it with SIGTERM as a cluster would. What the first tenth of the time showed is the
prediction for the rest: memory and open files stay there, and the telemetry goes on with as many rows a step and bytes
a row. Prints JSON; writes it, with the readings, with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
import torch

from normfree.studies import load_preset
from normfree.studies.relu_revival import LAYERNORM_GELU
from normfree.studies.study import run_config
from normfree.training import RunConfig
from normfree.training.records import LAYERS_FILE

MOST_TOKENS_A_SECOND = 10_000_000
MIB = 2**20


def endless(preset: str, hours: float) -> RunConfig:
    """The preset's baseline with telemetry in every step, longer than any machine gets in that time; no warm-up, which
    would be as long."""
    config = run_config(load_preset(preset), LAYERNORM_GELU, seed=0)
    tokens = int(max(hours, 1) * 3600 * MOST_TOKENS_A_SECOND)
    changed = {"telemetry_steps": 1, "tokens": tokens, "steps": None, "warmup_ratio": 0.0}
    return config.model_copy(update={"recipe": config.recipe.model_copy(update=changed)})


def reading(process: psutil.Process, table: Path, start: float) -> dict[str, float]:
    memory = process.memory_full_info()
    read: dict[str, float] = {
        "seconds": time.monotonic() - start,
        "own_mib": memory.uss / MIB,
        "resident_mib": memory.rss / MIB,
        "open_files": process.num_fds(),
    }
    if table.exists():
        with table.open("rb") as file:  # it may be replaced meanwhile
            rows = pq.read_metadata(file).num_rows
            read |= {"telemetry_rows": rows, "telemetry_bytes": os.fstat(file.fileno()).st_size}
    return read


def slope(readings: list[dict[str, float]], name: str) -> float:
    """By how much it grows in an hour."""
    return 3600 * statistics.linear_regression([r["seconds"] for r in readings], [r[name] for r in readings]).slope


def summary(readings: list[dict[str, float]], steps: int) -> dict[str, Any]:
    measured = [each for each in readings if each.get("telemetry_rows")]
    n_first = max(len(measured) // 10, 1)
    first, later = measured[:n_first], measured[n_first:]
    last, predicted_bytes_a_row = later[-1], first[-1]["telemetry_bytes"] / first[-1]["telemetry_rows"]
    return {
        "hours": last["seconds"] / 3600,
        "steps": steps,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two looks at the process")
    parser.add_argument("--run", type=Path, help="run folder, kept; default: a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = arguments.run or Path(temporary) / "run"
        written = Path(temporary) / "endless.yaml"
        written.write_text(endless(arguments.preset, arguments.hours).to_yaml({}))
        command = [sys.executable, "-m", "normfree", "train", str(written), "--out", str(run)]
        start, readings = time.monotonic(), []
        with subprocess.Popen(command) as training:
            process = psutil.Process(training.pid)
            while training.poll() is None and time.monotonic() - start < arguments.hours * 3600:
                time.sleep(arguments.every)
                readings.append(reading(process, run / LAYERS_FILE, start))
            training.send_signal(signal.SIGTERM)
            code = training.wait()
        if code != 128 + signal.SIGTERM:
            sys.exit(f"the run ended with code {code}")
        layers = pq.read_table(run / LAYERS_FILE, columns=["step"])["step"].to_numpy()
    rows_a_step = len(layers) / (layers.max() + 1)
    found = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "rows_a_step": rows_a_step,
        **summary(readings, int(layers.max()) + 1),
    }
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**found, "readings": readings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
