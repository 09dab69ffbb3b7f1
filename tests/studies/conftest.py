from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from normfree import cli

PRESET = {
    "description": "For tests.",
    "model_name": "tiny",
    "published": {"model": "GPT-2", "context_length": 128},
    "seeds": [0],
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16},
    "data": {
        "vocab_size": 290,
        "sequence_length": 16,
        "train_tokens": 4096,
        "eval_tokens": 512,
        "eval_fraction": 0.2,
    },
    "recipe": {
        "steps": 4,
        "batch_size": 4,
        "micro_batch_size": 4,
        "precision": "fp32",
        "telemetry_steps": 2,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
    },
}


@pytest.fixture
def preset_content(corpus_folder: Path) -> dict[str, Any]:
    """A preset of four steps on the made-up corpus, as its YAML file holds it."""
    data = {**PRESET["data"], "corpus": f"directory:{corpus_folder}"}  # type: ignore[dict-item]
    return {**PRESET, "data": data}


@pytest.fixture
def preset_file(preset_content: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(preset_content))
    return path


@pytest.fixture
def normfree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in a folder of its own; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        if words[0] in ("study", "train"):
            words += ["--cache-dir", str(tmp_path / "cache")]
        monkeypatch.setattr("sys.argv", ["normfree", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run
