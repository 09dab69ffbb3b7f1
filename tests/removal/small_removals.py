"""Small removals that several tests begin: a corpus of eight words, a GPT-2, and a run of sixteen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfree.removal import finetuning
from normfree.training import RunConfig

from .models import stock

T, STEPS = 24, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("corpus"), 400)


def write_words(folder: Path, n: int) -> Path:
    """Writes ``n`` documents of forty words, of eight."""
    words = np.random.default_rng(0).choice(["def", "return", "x", "y", "+", "for", "in", "range"], (n, 40))
    for number, row in enumerate(words):
        (folder / f"{number}.py").write_text(" ".join(row) + "\n")
    return folder


def run_from(model: str, corpus: Path, **recipe: Any) -> RunConfig:
    options: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 4,
        "micro_batch_size": 4,
        "precision": "fp32",
        "learning_rate": 1e-3,
    }
    every = {"logging_steps": 1, "telemetry_steps": 5, "save_steps": 4, "eval_steps": 100}
    data = {"corpus": f"directory:{corpus}", "vocab_size": 270, "sequence_length": T, "eval_tokens": 20 * T}
    return RunConfig.model_validate(
        {
            "model_name": "small",
            "configuration": "any",
            "model": {},
            "data": data,
            "recipe": options | every | recipe,
            "start_from": model,
        }
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    small = stock("gpt2")
    small.resize_token_embeddings(270)
    small.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return finetuning.constant_std_model(folder).state_dict()
