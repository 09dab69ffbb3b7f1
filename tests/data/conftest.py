from pathlib import Path

import pytest

from .made_up import document, write_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of a few hundred tokens each."""
    return write_documents(tmp_path / "corpus", {f"a/{seed}.py": document(seed) for seed in range(40)})
