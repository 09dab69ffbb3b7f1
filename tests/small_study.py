"""A preset of four steps, and fixtures that spare studies what a test does not ask for: drawing, long timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from normfree.report import save_figure

PRESET = {
    "description": "For tests.",
    "caution": "A test proves nothing.",
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


def without_drawing(figure: Figure, folder: Path, name: str) -> list[Path]:
    """In the place of ``save_figure``: saves a blank one."""
    return save_figure(Figure(figsize=(0.1, 0.1)), folder, name)


@pytest.fixture(autouse=True)
def blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports save their figures without drawing them, which takes half of a small study, except in tests ``drawn``.

    The gallery draws every figure.
    """
    if "drawn" not in request.keywords:
        monkeypatch.setattr("normfree.report.saving.save_figure", without_drawing)


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of decode are timed, but not well."""
    monkeypatch.setattr("normfree.studies.spark.decode_seconds.N_ROUND", 2)
    monkeypatch.setattr("normfree.timing.MIN_SECONDS", 1e-9)
