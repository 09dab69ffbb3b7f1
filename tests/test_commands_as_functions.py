"""The table of functions in docs/notebooks.md: every command is in it, and every function exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from normfree.benchmarks import __path__ as benchmarks
from normfree.cli import COMMANDS
from normfree.cli.bench_tables import TABLES

PAGE = (Path(__file__).parent.parent / "docs" / "notebooks.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([A-Za-z -]+)` \| `([\w.]+)` \|$", PAGE, re.MULTILINE))
STUDIES = {"study", "study-worker", "report"}
"""Those of `run_study` and `load_study`, and of a worker."""


def test_every_command_is_a_function() -> None:
    names = {command.__name__.replace("_", "-") for command in COMMANDS} | {"bench NAME", "private-cost"}
    assert set(ROWS) == names - STUDIES


@pytest.mark.parametrize("path", [path for path in ROWS.values() if "NAME" not in path])
def test_the_function_exists_and_is_documented(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(import_module(module), name).__doc__


@pytest.mark.parametrize("name", TABLES)
def test_every_benchmark_is_a_function(name: str) -> None:
    assert (Path(benchmarks[0]) / f"{name}.py").exists()
    path = ROWS["bench NAME"].replace("NAME", name)
    module, _, function = path.rpartition(".")
    assert getattr(import_module(module), function).__doc__
