"""The map of where ReLU beats GELU: sizes, learning rates and context lengths from one preset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from normfree.runner import load_preset, run_config
from normfree.studies import scaling
from normfree.studies.scaling import SCALING, SIZES

Command = Callable[..., tuple[int, str, str]]


def test_sizes_vary_one_at_a_time_and_heads_keep_their_width() -> None:
    preset = load_preset("cpu")
    shapes: dict[Any, Any] = {}
    for configuration in SIZES.configurations(preset):
        run = run_config(preset, configuration, seed=0)
        config = run.build_model_config(512)
        assert config.head_dim == 32
        shapes.setdefault((config.n_layer, config.n_embd), []).append((config.activation, run.recipe.learning_rate))
    assert set(shapes) == {(6, 128), (6, 64), (6, 256), (3, 128), (12, 128)}
    for runs in shapes.values():
        assert sorted(runs) == [(name, rate) for name in ("gelu", "relu") for rate in (5e-4, 1e-3, 2e-3)]


def test_twice_the_context_has_as_many_tokens_in_a_step() -> None:
    own, longer = SCALING.members("cpu", lambda preset: preset)
    lengths = [each.preset.data.sequence_length for each in (own, longer)]
    assert lengths == [128, 256]
    assert own.preset.recipe.batch_size * 128 == longer.preset.recipe.batch_size * 256


def test_the_study_leaves_its_map(
    normfree: Command, preset_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "LEARNING_RATE_FACTORS", (1.0, 2.0))
    monkeypatch.setattr(scaling, "SIZE_FACTORS", (2.0,))
    recipe = {**preset_content["recipe"], "steps": 1, "eval_steps": 1, "save_steps": 1}
    model = {**preset_content["model"], "n_embd": 8}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**preset_content, "recipe": recipe, "model": model}))
    code, out, err = normfree("study", "scaling", "--preset", "tiny.yaml", "--out", "map")
    assert code == 0, err
    assert len(pd.read_csv(tmp_path / "map" / "results.csv")) == 16
    assert (tmp_path / "map" / "figures" / "loss-gap.pdf").exists()
    page = (tmp_path / "map" / "report.html").read_text()
    assert "base, T = 32" in page
    assert "width 16" in page
    assert "SM+R, depth 4, 0.002" in out


def test_what_cannot_be_halved_or_tuned_is_one_line(normfree: Command, preset_file: Path) -> None:
    code, _, err = normfree(
        "study", "scaling", "--preset", preset_file, "--set", "model.n_layer=3", "--steps", "1", "--out", "a"
    )
    assert (code, "use even numbers" in err) == (2, True)
    code, _, err = normfree("study", "scaling", "--preset", preset_file, "--tune-lr", "--out", "b")
    assert (code, "--tune-lr means nothing for scaling-sizes" in err) == (2, True)
