"""``normfree bench long-run``: what readings say, and the watching of a process."""

from __future__ import annotations

import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from normfree.benchmarks import long_run
from normfree.errors import InputError, RunFailedError


def made_up_reading(i: int) -> dict[str, float]:
    """Every 36 seconds: a MiB more a time, and from the third on 100 rows of telemetry more."""
    read = {"seconds": 36.0 * i, "own_mib": 500.0 + i, "resident_mib": 800.0, "open_files": 6.0}
    if i < 2:
        return read
    return read | {"telemetry_rows": 100.0 * (i - 1), "telemetry_bytes": 1000.0 + 400.0 * (i - 1)}


def test_summary() -> None:
    # 22 readings, 20 of them with telemetry: the first tenth are those of i = 2 and 3
    found = long_run.summary([made_up_reading(i) for i in range(22)])
    assert found.pop("hours") == pytest.approx(21 * 36 / 3600)
    assert found.pop("telemetry_rows") == 2000
    assert found.pop("telemetry_mib") == pytest.approx(9000 / 2**20)
    assert found.pop("telemetry_bytes_a_row") == pytest.approx(4.5)
    # after i = 3: 1,800 bytes for 200 rows, 9 a row
    assert found.pop("telemetry_bytes_over_predicted") == pytest.approx(4.5 / 9)
    # a MiB in 36 seconds
    assert found.pop("own_mib_growth_an_hour") == pytest.approx(100.0)
    assert found.pop("open_files_growth_an_hour") == pytest.approx(0.0)
    assert found == {
        "own_mib_first_tenth": 502.5,
        "own_mib_last_tenth": 520.5,
        "own_mib_largest": 521.0,
        "resident_mib_first_tenth": 800.0,
        "resident_mib_last_tenth": 800.0,
        "open_files_first_tenth": 6.0,
        "open_files_last_tenth": 6.0,
        "open_files_largest": 6.0,
    }


def test_a_slope_is_that_of_the_least_squares_line() -> None:
    readings = [{"seconds": s, "x": x} for s, x in ((0.0, 1.0), (1800.0, 1.0), (3600.0, 4.0))]
    # Σ (s − 1800)(x − 2) / Σ (s − 1800)² = 1800 · 3 / (2 · 1800²) a second
    assert long_run.slope(readings, "x") == pytest.approx(3.0)


def test_too_few_readings() -> None:
    with pytest.raises(InputError, match="telemetry was on disk in 2 of 4 looks at the run, and 3 are needed"):
        long_run.summary([made_up_reading(i) for i in range(4)])


def test_a_reading_of_this_process(tmp_path: Path) -> None:
    table, start = tmp_path / "layers.parquet", time.monotonic() - 5
    first = long_run.reading(psutil.Process(), table, start)
    assert first.keys() == {"seconds", "own_mib", "resident_mib", "open_files"}
    assert 5 <= first["seconds"] < 15
    assert 0 < first["own_mib"] <= first["resident_mib"]
    pq.write_table(pa.table({"step": [0, 0, 1]}), table)
    with table.open("rb"):
        second = long_run.reading(psutil.Process(), table, start)
    assert second["telemetry_rows"] == 3
    assert second["telemetry_bytes"] == table.stat().st_size
    assert second["open_files"] == first["open_files"] + 1


SAVES_ITSELF = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({128 + signal.SIGTERM}))
print("training")
time.sleep(60)
"""


def test_a_process_is_watched_and_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    readings = long_run._watched([sys.executable, "-u", "-c", SAVES_ITSELF], tmp_path / "none", 2.5, 0.5)
    assert time.monotonic() - start < 30
    assert len(readings) >= 2
    assert all(later["seconds"] - sooner["seconds"] > 0.5 for sooner, later in pairwise(readings))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "training\n"), "standard output is the result's alone"


def test_a_process_that_ends_by_itself(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="the run ended with code 3 after"):
        long_run._watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "none", 60.0, 0.2)


def test_a_run_that_cannot_end_before_its_time() -> None:
    config = long_run._endless("cpu", 2.0)
    assert config.recipe.telemetry_steps == 1
    assert config.recipe.steps is None
    assert config.recipe.tokens == 2 * 3600 * 10_000_000
    assert config.configuration == "SM+LN+G"
