"""Loss by training length: members of one corpus, excesses of the same seed and length, and where signs change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from normfree.errors import InputError
from normfree.runner import load_preset, run_config
from normfree.studies import training_length
from normfree.studies.training_length import (
    CONFIGURATIONS,
    TRAINING_LENGTH,
    crossings,
    excess_by_length,
    excess_losses,
    formatted_excess,
)
from tests.legends import legend_texts

Command = Callable[..., tuple[int, str, str]]
LENGTHS = (1_000_000, 2_000_000, 4_000_000)
EXCESS = {"SM+R": (-0.3, -0.1, 0.2), "SM+G": (0.4, 0.3, 0.1)}


def made_up(seeds: int = 2) -> pd.DataFrame:
    """A baseline that falls from 4 by length and rises by seed, and two others by ``EXCESS``."""
    rows = []
    for place, tokens in enumerate(LENGTHS):
        for seed in range(seeds):
            loss = 4 - 0.5 * place + 0.01 * seed
            rows.append((tokens, "SM+LN+G", seed, loss))
            rows += [(tokens, name, seed, loss + each[place] + 0.02 * seed) for name, each in EXCESS.items()]
    return pd.DataFrame(rows, columns=["tokens", "configuration", "seed", "eval_loss"])


def test_members_share_the_corpus_and_have_their_share_of_the_steps() -> None:
    members = TRAINING_LENGTH.members("cpu-long", lambda preset: preset)
    assert [each.preset.recipe.steps for each in members] == [2003, 4005, 8011, 16022, 32043]
    assert {each.preset.data for each in members} == {load_preset("cpu-long").data}
    last = run_config(members[-1].preset, CONFIGURATIONS[0], 0)
    assert last.recipe == run_config(load_preset("cpu-long"), CONFIGURATIONS[0], 0).recipe
    with pytest.raises(InputError, match="takes sixteenths of the steps, and the preset has 9"):
        TRAINING_LENGTH.members(
            "smoke", lambda preset: preset.with_changes(**{"recipe.tokens": None, "recipe.steps": 9})
        )


def test_an_excess_is_against_the_same_seed_and_length() -> None:
    found = excess_losses(made_up())
    assert "SM+LN+G" not in set(found["configuration"])
    for _, row in found.iterrows():
        expected = EXCESS[row["configuration"]][LENGTHS.index(row["tokens"])] + 0.02 * row["seed"]
        assert row["excess_nats"] == pytest.approx(expected)
    runs = made_up()
    is_gone = (runs["configuration"] == "SM+LN+G") & (runs["seed"] == 1) & (runs["tokens"] == LENGTHS[0])
    assert len(excess_losses(runs[~is_gone])) == len(found) - 2
    with pytest.raises(InputError, match="seed"):
        excess_losses(runs.drop(columns="seed"))


def test_a_change_of_places_lies_between_two_lengths() -> None:
    assert crossings(excess_losses(made_up())) == {"SM+R": [(2_000_000, 4_000_000)]}
    diverged = made_up()
    diverged.loc[(diverged["configuration"] == "SM+R") & (diverged["tokens"] == LENGTHS[1]), "eval_loss"] = np.nan
    assert crossings(excess_losses(diverged)) == {"SM+R": [(1_000_000, 4_000_000)]}


def test_the_table_has_losses_of_the_baseline_and_excesses_of_the_others() -> None:
    table = formatted_excess(made_up(1)).set_index("Configuration")
    assert table.columns.tolist() == ["1.0M", "2.0M", "4.0M"]
    assert list(table.loc["SM+LN+G"]) == ["4.000", "3.500", "3.000"]
    assert list(table.loc["SM+R \N{MINUS SIGN} SM+LN+G"]) == ["\N{MINUS SIGN}0.300", "\N{MINUS SIGN}0.100", "+0.200"]
    assert "±" in formatted_excess(made_up(2)).set_index("Configuration")["1.0M"].loc["SM+LN+G"]


def test_the_figure_has_a_line_for_each_but_the_baseline() -> None:
    figure = excess_by_length(excess_losses(made_up()))
    (axes,) = figure.axes
    assert legend_texts(axes) == ["SM+R", "SM+G", "SM+LN+G"]
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()}
    np.testing.assert_allclose(lines["SM+R"], np.array(EXCESS["SM+R"]) + 0.01)
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1.0M", "2.0M", "4.0M"]


def test_the_study_leaves_its_table_and_figure(
    normfree: Command, preset_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_length, "SHARES", (0.5, 1.0))
    recipe = {**preset_content["recipe"], "steps": 2, "eval_steps": 2, "save_steps": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**preset_content, "recipe": recipe}))
    code, _, err = normfree("study", "training-length", "--preset", "tiny.yaml", "--out", "length")
    assert code == 0, err
    folder = tmp_path / "length"
    assert sorted(path.name for path in folder.glob("steps-*")) == ["steps-1", "steps-2"]
    assert (folder / "figures" / "excess-by-length.png").exists()
    page = (folder / "report.html").read_text()
    assert "Loss less that of SM+LN+G, nats, after 64.0, 128.0 tokens: SM+LN+R: " in page
    runs = pd.read_csv(folder / "results.csv")
    assert runs.groupby("configuration").size().to_dict() == {each.label: 2 for each in CONFIGURATIONS}
