"""Every command that takes a model takes a GGUF file, and says how its weights were quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
from tests.modeling.gguf_files import built, write_gguf  # noqa: E402

CORPUS = ("--corpus", "CORPUS", "--sequence-length", "16")
SMALL = (
    "data.sequence_length=16",
    "data.eval_tokens=256",
    "recipe.precision=fp32",
    "recipe.batch_size=4",
    "recipe.micro_batch_size=4",
)
BUDGET = ("--corpus", "CORPUS", *(word for setting in SMALL for word in ("--set", setting)))
COMMANDS = {
    "entropy": ("entropy", "MODEL", *CORPUS, "--sequences", "2"),
    "depth": ("depth", "MODEL", *CORPUS, "--sequences", "2", "--probes", "2"),
    "prune-layers": ("prune-layers", "MODEL", "--drop", "6"),
    "to-spark": ("to-spark", "MODEL"),
    "interpret": ("interpret", "MODEL", *CORPUS, "--sequences", "2"),
    "remove-norm": (
        "remove-norm",
        "MODEL",
        *BUDGET,
        "--steps",
        "40",
        "--no-vanilla",
        "--set",
        "recipe.learning_rate=1e-4",
    ),
    "finetune": ("finetune", "MODEL", *BUDGET, "--steps", "2"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = built("llama")
    with torch.no_grad():
        for parameter in small.parameters():
            # The weights are large for their width: a model of so many layers would diverge without its norms.
            parameter.mul_(0.2 if parameter.dim() == 2 else 1.0)
    return write_gguf(small, tmp_path_factory.mktemp("gguf") / "tiny.gguf", quantized=gguf.GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gguf_file_is_a_model(
    command: str, normfree: Callable[..., tuple[int, str, str]], model: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    places = {"MODEL": model, "CORPUS": f"directory:{corpus_folder}"}
    words = [places.get(word, word) for word in COMMANDS[command]]
    code, out, error = normfree(*words, "--out", tmp_path / "out", "--json")
    assert code == 0, error
    assert "dequantized to float32" in out
    json.loads(out)
    assert any((tmp_path / "out").iterdir())
