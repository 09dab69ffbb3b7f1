from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.made_up import document, write_documents


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve made-up documents."""
    folder = tmp_path_factory.mktemp("small-corpus")
    return write_documents(folder, {f"{seed}.py": document(seed, 200) for seed in range(12)})


@pytest.fixture(scope="session")
def run_content(small_corpus: Path) -> dict[str, Any]:
    """A run of eleven steps over three epochs, whose logging, telemetry and checkpoints do not fall together.

    Its learning rate does not end at 0: a step too many would show.
    """
    return {
        "model_name": "tiny",
        "configuration": "mine",
        "seed": 3,
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "embedding_dropout": 0.1},
        "data": {
            "corpus": f"directory:{small_corpus}",
            "vocab_size": 270,
            "sequence_length": 16,
            "train_tokens": 320,
            "eval_tokens": 64,
            "eval_fraction": 0.3,
        },
        "recipe": {
            "steps": 11,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "learning_rate_decay": "cosine",
            "final_learning_rate_ratio": 0.5,
            "precision": "fp32",
            "telemetry_steps": 2,
            "logging_steps": 3,
            "eval_steps": 4,
            "save_steps": 2,
        },
    }


@pytest.fixture
def run_file(run_content: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_content))
    return path


@pytest.fixture
def train_command(run_file: Path) -> Callable[[Path], tuple[object, ...]]:
    """The arguments of ``normfree train`` in a folder, which also holds the cache."""

    def arguments(folder: Path) -> tuple[object, ...]:
        return "train", run_file, "--out", folder / "run", "--cache-dir", folder / "cache"

    return arguments
