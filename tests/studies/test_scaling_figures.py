import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.studies.scaling import loss_gap, loss_gap_heatmap


def runs(losses: dict[tuple[str, str, float], list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"size": size, "activation": activation, "learning_rate": rate, "seed": seed, "eval_loss": loss}
            for (size, activation, rate), seeds in losses.items()
            for seed, loss in enumerate(seeds)
        ]
    )


LOSSES = {
    ("small", "G", 1e-3): [4.0, 4.2],
    ("small", "R", 1e-3): [3.0, 3.4],
    ("small", "G", 2e-3): [3.5, 3.5],
    ("small", "R", 2e-3): [3.9, 4.1],
    ("large", "G", 1e-3): [2.0, np.nan],
    ("large", "R", 1e-3): [1.0, 1.0],
    ("large", "G", 2e-3): [2.6, 2.8],
    ("large", "R", 2e-3): [np.nan, np.nan],
}


def test_the_gap_is_the_mean_difference_over_seeds() -> None:
    gap = loss_gap(runs(LOSSES), "G", "R")
    assert gap.index.tolist() == ["0.001", "0.002", "own best"]
    assert gap.columns.tolist() == ["small", "large"]
    np.testing.assert_allclose(gap["small"], [0.9, -0.5, 3.5 - 3.2])
    np.testing.assert_allclose(gap["large"], [np.nan, np.nan, 2.7 - 1.0])


def test_a_rate_at_which_a_seed_diverged_is_not_the_best() -> None:
    gap = loss_gap(runs({**LOSSES, ("large", "G", 2e-3): [np.nan, 2.8]}), "G", "R")
    assert np.isnan(gap["large"].to_numpy()[-1])


def test_missing_runs_are_nan_and_repeated_ones_an_error() -> None:
    gap = loss_gap(runs({key: value for key, value in LOSSES.items() if key[2] != 2e-3 or key[0] == "small"}), "G", "R")
    assert np.isnan(gap["large"].to_numpy()[1])
    twice = pd.concat([runs(LOSSES), runs(LOSSES).head(1)])
    with pytest.raises(InputError, match="a run twice"):
        loss_gap(twice, "G", "R")
    with pytest.raises(InputError, match="lacks eval_loss"):
        loss_gap(runs(LOSSES).drop(columns="eval_loss"), "G", "R")


def test_the_heatmap_writes_percent_of_perplexity() -> None:
    figure = loss_gap_heatmap(loss_gap(runs(LOSSES), "G", "R"), first="G", second="R")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"+146 %", "\N{MINUS SIGN}39 %", "+35 %", "+447 %", "\N{EN DASH}"}  # 100 (exp(0.9) - 1) and so on
    assert len(figure.axes[0].patches) == 2  # the hatched cells
    assert figure.axes[0].get_ylabel() == "learning rate"


def test_a_map_of_nothing_but_divergence_can_be_drawn() -> None:
    gap = loss_gap(runs({key: [np.nan] for key in LOSSES}), "G", "R")
    assert gap.isna().all().all()
    loss_gap_heatmap(gap, first="G", second="R").canvas.draw()
