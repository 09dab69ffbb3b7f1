from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from normfree.errors import InputError
from normfree.report import load_published
from normfree.studies.norm_removal.figures import removal_loss_curves, removal_scaling
from normfree.studies.norm_removal.tables import (
    REMOVALS,
    PowerLaw,
    Reached,
    at_best_rates,
    formatted_removals,
    power_law,
    published_removals,
    removal_table,
    tokens_to_reach,
)
from tests.legends import legend_texts

MINUS = "\N{MINUS SIGN}"
LOSSES = {  # by rate: vanilla, norm-free of seeds 0, 1, 2
    1e-4: ([3.00, 3.02, 3.01], [3.10, 3.09, 3.14]),
    3e-4: ([3.01, 3.00, 3.03], [3.06, 3.04, 3.05]),
    1e-3: ([2.90, 2.91, np.nan], [2.80, 2.81, np.nan]),
}
ORIGINAL = [3.05, 3.07, 3.03]


def removals(losses: dict[float, tuple[list[float], list[float]]] = LOSSES) -> pd.DataFrame:
    rows = [
        ("small", 0.05, rate, seed, variant, 1000, loss)
        for rate, (vanilla, norm_free) in losses.items()
        for seed in range(3)
        for variant, loss in (("original", ORIGINAL[seed]), ("vanilla", vanilla[seed]), ("norm-free", norm_free[seed]))
    ]
    return pd.DataFrame(rows, columns=list(REMOVALS))


def test_each_variant_has_its_own_best_rate_and_a_diverged_seed_rules_a_rate_out() -> None:
    best = at_best_rates(removals())
    assert len(best) == 9
    rates = best.groupby("variant")["learning_rate"].unique()
    assert rates["vanilla"].tolist() == [1e-4]
    assert rates["norm-free"].tolist() == [3e-4]
    assert np.isnan(rates["original"]).all()
    assert best.loc[best["variant"] == "original", "eval_loss"].tolist() == ORIGINAL


def test_the_table_has_paired_t_intervals() -> None:
    (row,) = removal_table(removals()).to_dict("records")
    vanilla, norm_free = np.array(LOSSES[1e-4][0]), np.array(LOSSES[3e-4][1])
    assert row["norm-free"] == pytest.approx(norm_free.mean())
    for name, differences in (("to_vanilla", norm_free - vanilla), ("to_original", norm_free - ORIGINAL)):
        low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
        np.testing.assert_allclose(
            [row[f"{name}_low"], row[name], row[f"{name}_high"]], [low, differences.mean(), high]
        )
    shown = formatted_removals(pd.DataFrame([row])).iloc[0]
    assert shown["To vanilla"].startswith("+0.0400 ± ")
    assert shown["Rates"] == "0.0001, 0.0003"
    assert shown["Budget"] == "5 %"


def test_a_variant_that_diverged_everywhere_is_nan_and_not_left_out() -> None:
    gone = {rate: (vanilla, [np.nan] * 3) for rate, (vanilla, _) in LOSSES.items()}
    (row,) = removal_table(removals(gone)).to_dict("records")
    assert np.isnan([row["norm-free"], row["to_vanilla"], row["to_original"], row["norm-free_learning_rate"]]).all()
    assert np.isfinite(row["vanilla"])
    assert formatted_removals(pd.DataFrame([row])).iloc[0]["Norm-free"] == "NaN"


def test_a_rate_without_all_seeds_is_no_candidate() -> None:
    frame = removals()
    unfinished = frame[(frame["learning_rate"] != 3e-4) | (frame["seed"] < 2)]
    best = at_best_rates(unfinished)
    assert set(best.loc[best["variant"] == "norm-free", "learning_rate"]) == {1e-4}
    with pytest.raises(InputError, match="more than one row"):
        at_best_rates(pd.concat([frame, frame.head(1)]))


def test_the_published_table() -> None:
    table = published_removals(load_published("ln_removal_gpt2_cross_entropy")).set_index("Model")
    assert table.index.tolist() == ["GPT-2 Small", "GPT-2 Medium", "GPT-2 Large", "GPT-2 XL"]
    assert list(table.loc["GPT-2 Small"]) == ["300", "3.1006", "3.0126", "3.0797", "+0.0671", f"{MINUS}0.0209"]


@given(st.floats(-2, 2), st.floats(-3, 9), st.integers(3, 8))
def test_a_power_law_without_noise_is_found_exactly(exponent: float, log_factor: float, n: int) -> None:
    x = np.logspace(3, 7, n)
    fit = power_law(x.tolist(), (np.exp(log_factor) * x**exponent).tolist())
    np.testing.assert_allclose([fit.exponent, fit.low, fit.high], exponent, atol=1e-6)
    np.testing.assert_allclose(np.log(fit.factor), log_factor, atol=1e-6)
    assert fit.n == n


def test_the_interval_of_the_exponent_against_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat([1e4, 1e5, 1e6, 1e7], 2)
    y = 30 * x**0.6 * np.exp(0.1 * rng.normal(size=8))
    design = np.stack([np.ones(8), np.log(x)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    slope = inverse @ design.T @ np.log(y)
    residual = np.log(y) - design @ slope
    half = stats.t.ppf(0.975, 6) * np.sqrt(residual @ residual / 6 * inverse[1, 1])
    fit = power_law(x.tolist(), y.tolist())
    np.testing.assert_allclose([fit.exponent, fit.low, fit.high], [slope[1], slope[1] - half, slope[1] + half])


def test_too_few_points_and_bad_ones() -> None:
    two = power_law([1e4, 1e6], [10.0, 100.0])
    assert two.exponent == pytest.approx(0.5)
    assert np.isnan([two.low, two.high]).all()
    assert np.isnan(power_law([1e4, 1e4], [1.0, 2.0]).exponent)
    assert np.isnan(power_law([], []).exponent)
    with pytest.raises(InputError, match="positive and finite"):
        power_law([1.0, 2.0], [1.0, np.nan])


@given(st.floats(0.2, 3), st.floats(2e3, 9e5))
def test_the_tokens_to_a_threshold_are_exact_where_the_loss_is_linear_in_log_tokens(slope: float, at: float) -> None:
    tokens = [1e3, 1e4, 1e5, 1e6]
    excess = [0.05 - slope * np.log(each / at) for each in tokens]
    found = tokens_to_reach(tokens[::-1], excess[::-1], 0.05)
    assert found.bound == "interpolated"
    assert found.tokens == pytest.approx(at, rel=1e-9)


@pytest.mark.parametrize(
    ("excess", "expected"),
    [
        ([0.04, 0.03, 0.02], Reached(10.0, "at most")),
        ([0.30, 0.20, 0.06], Reached(1000.0, "more than")),
        ([np.nan, np.nan, np.nan], Reached(1000.0, "more than")),
        ([np.nan, 0.02, 0.01], Reached(100.0, "at most")),
        ([0.10, np.nan, 0.01], Reached(1000.0, "at most")),
    ],
)
def test_censored_tokens(excess: list[float], expected: Reached) -> None:
    assert tokens_to_reach([10, 100, 1000], excess, 0.05) == expected


def test_budgets_are_different_and_positive() -> None:
    for tokens in ([], [10, 10], [0, 10]):
        with pytest.raises(InputError, match="different positive budgets"):
            tokens_to_reach(tokens, [0.1] * len(tokens), 0.05)


def test_the_loss_figure_marks_every_removal_and_breaks_at_nan() -> None:
    steps = np.arange(1, 11)
    norm_free = 3.0 + 0.1 * steps
    norm_free[4] = np.inf
    curves = pd.DataFrame(
        [
            {"configuration": "small", "variant": variant, "step": step, "loss_nats": loss}
            for variant, losses in (("vanilla", np.full(10, 3.0)), ("norm-free", norm_free))
            for step, loss in zip(steps, losses, strict=True)
        ]
    )
    removed = pd.DataFrame(
        {"configuration": "small", "step": [2, 3, 6], "part": ["ffn", "ffn", "final"], "layer": [0, 1, None]}
    )
    figure = removal_loss_curves(curves, removed)
    figure.canvas.draw()
    when, above, below = figure.axes
    lines: Any = when.collections
    marks = [segment[0, 0] for each in lines for segment in each.get_segments()]
    assert sorted(marks) == [3, 4, 7], "a removal before step 2 (from 0) is first in the loss of step 3 (from 1)"
    difference = np.asarray(below.lines[-1].get_ydata())
    np.testing.assert_allclose(difference, np.where(steps == 5, np.nan, 0.1 * steps))
    assert above.get_ylabel() == "training loss (nats)"
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {"vanilla", "norm-free", "before the FFN", "final norm"}


def test_the_scaling_figure_shows_censored_sizes() -> None:
    budgets = [1000, 10_000]
    excess = pd.DataFrame(
        [
            {"size": size, "parameters": n, "seed": 0, "finetuning_tokens": tokens, "excess_nats": loss}
            for size, n, losses in (
                ("a", 10_000, [0.04, 0.01]),
                ("b", 100_000, [0.1, 0.02]),
                ("c", 1_000_000, [1, 0.5]),
            )
            for tokens, loss in zip(budgets, losses, strict=True)
        ]
    )
    reached = pd.DataFrame(
        {
            "size": ["a", "b", "c"],
            "parameters": [10_000, 100_000, 1_000_000],
            "seed": 0,
            "tokens": [1e3, 4e3, 1e4],
            "bound": ["at most", "interpolated", "more than"],
        }
    )
    nan = float("nan")
    figure = removal_scaling(excess, reached, PowerLaw(nan, nan, nan, nan, 1), threshold=0.05)
    figure.canvas.draw()
    left, right = figure.axes
    assert legend_texts(left) == ["a (10k)", "b (100k)", "c (1M)"]
    assert legend_texts(right) == ["interpolated", "at most this", "more than this"]
    assert len(right.lines) == 0
    fitted = removal_scaling(excess, reached, PowerLaw(0.5, 0.4, 0.6, 2.0, 5), threshold=0.05)
    (line,) = fitted.axes[1].lines
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [200.0, 2000.0])
    with pytest.raises(InputError, match="give both of all"):
        removal_scaling(excess[excess["size"] != "c"], reached, PowerLaw(0.5, 0.4, 0.6, 2.0, 5), threshold=0.05)
