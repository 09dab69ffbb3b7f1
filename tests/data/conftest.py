from pathlib import Path

import pytest

from .made_up import document, write_documents


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that forgets to replace the hub fails at once instead of retrying."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of a few hundred tokens each."""
    return write_documents(tmp_path / "corpus", {f"a/{seed}.py": document(seed) for seed in range(40)})
