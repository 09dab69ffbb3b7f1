"""The house as a whole: no import circles between files, and no function longer than a screen."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import grimp
import pytest

import normfree

PACKAGES = [name for name in ("normfree", "normfree_private") if find_spec(name) is not None]
MOST_LINES = 60
LONG = {"normfree.training.loop.run"}
"""Functions that may be longer: the training loop is one, to be read from top to bottom."""


def test_no_import_circles_between_files() -> None:
    """Imports for type checkers count as well."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 200
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")


def test_functions_fit_on_a_screen() -> None:
    source = Path(normfree.__file__).parent
    long = {}
    for path in source.rglob("*.py"):
        module = ".".join(("normfree", *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                n_line = node.end_lineno - node.lineno + 1
                if n_line > MOST_LINES and f"{module}.{node.name}" not in LONG:
                    long[f"{module}.{node.name}"] = n_line
    assert not long, f"longer than {MOST_LINES} lines; split them"
