"""Runs the checks of a family for each of its cases."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.modeling.conversion.checks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    family = metafunc.cls
    if "case" in metafunc.fixturenames and family is not None:
        metafunc.parametrize("case", family.cases.values(), ids=[name or "default" for name in family.cases])
