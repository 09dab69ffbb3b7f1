from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.made_up import document, write_documents
from tests.forked import normfree
from tests.nightly import NIGHTLY

from .launch import together

Trained = Callable[..., Path]


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose micro-batches are the same for one, two and four processes.

    An epoch is six steps and two sequences that are left over; the evaluation has five batches, which neither two nor
    four processes can share equally, the last of them with one sequence only.
    """
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder, {f"{seed}.py": document(seed, 200) for seed in range(24)})
    return {
        "model_name": "tiny",
        "configuration": "mine",
        "seed": 3,
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16},
        "data": {
            "corpus": f"directory:{folder}",
            "vocab_size": 270,
            "sequence_length": 16,
            "train_tokens": 800,
            "eval_tokens": 144,
            "eval_fraction": 0.3,
        },
        "recipe": {
            "steps": 200 if NIGHTLY else 11,
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "learning_rate_decay": "cosine",
            "final_learning_rate_ratio": 0.5,
            "precision": "fp32",
            "telemetry_steps": 2,
            "logging_steps": 1,
            "eval_steps": 4,
            "save_steps": 4,
        },
    }


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(content: dict[str, Any], cache: Path, tmp_path: Path) -> Callable[..., tuple[object, ...]]:
    """The arguments of ``normfree train`` in ``tmp_path / name``, with other values for some options of the recipe."""

    def arguments(name: str, *, model: dict[str, Any] | None = None, **recipe: Any) -> tuple[object, ...]:
        changed = {
            **content,
            "model": {**content["model"], **(model or {})},
            "recipe": {**content["recipe"], **recipe},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(changed))
        return "train", path, "--out", tmp_path / name, "--cache-dir", cache

    return arguments


@pytest.fixture(scope="session")
def alone(content: dict[str, Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    ended = together(1, normfree("train", folder / "run.yaml", "--out", folder / "run", "--cache-dir", cache), folder)
    assert ended.codes == [0], ended.output
    return folder / "run"
