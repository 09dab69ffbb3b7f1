"""The engine, where `make private` has made its environment."""

from __future__ import annotations

import pytest

from normfree.errors import InputError
from normfree_private.environment import Engine, find_engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    try:
        return find_engine()
    except InputError as error:
        pytest.skip(str(error))
