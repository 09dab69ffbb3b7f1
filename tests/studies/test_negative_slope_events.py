"""First NaN and entropy collapse, on frames small enough to read the answer from."""

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.studies.negative_slope.events import entropy_collapse, first_nonfinite

RUN = {"model": "tiny", "context_length": 128, "configuration": "SM+L 0.1", "seed": 0}
COUNTS = ("scores_nan_count", "scores_inf_count", "residual_nan_count", "residual_inf_count")
NAN = float("nan")


def layers(counts: dict[tuple[int, int], tuple[int, int, int, int]], **run) -> pd.DataFrame:
    """Steps 0, 10, 20, 30 of three layers; ``counts`` by (step, layer), zero elsewhere."""
    return pd.DataFrame(
        [
            {**RUN, **run, "step": step, "layer": layer}
            | dict(zip(COUNTS, counts.get((step, layer), (0, 0, 0, 0)), strict=True))
            for step in (0, 10, 20, 30)
            for layer in (0, 1, 2)
        ]
    )


def entropies(by_layer: list[list[float]], **run) -> pd.DataFrame:
    """A list of readings each layer, every 10 steps."""
    return pd.DataFrame(
        [
            {**RUN, **run, "step": 10 * place, "layer": layer, "entropy_nats": value}
            for layer, readings in enumerate(by_layer)
            for place, value in enumerate(readings)
        ]
    )


def collapse_steps(readings: list[float], share: float = 0.1) -> tuple[object, int]:
    """Of one layer, with a bound of 4 nats: the step, and the number of NaN readings."""
    (row,) = entropy_collapse(entropies([readings]), 4.0, share=share).to_dict("records")
    return (None if pd.isna(row["step"]) else row["step"]), row["nan_readings"]


def test_the_first_nan_is_where_the_forward_pass_meets_it_first():
    frame = layers({(20, 2): (5, 0, 9, 0), (20, 1): (0, 3, 7, 1), (30, 0): (1, 1, 1, 1)})
    (row,) = first_nonfinite(frame.sample(frac=1, random_state=0)).to_dict("records")
    assert row == {**RUN, "step": 20, "layer": 1, "place": "attention scores", "nan_count": 0, "inf_count": 3}


def test_a_residual_stream_may_break_before_any_score():
    (row,) = first_nonfinite(layers({(10, 0): (0, 0, 0, 2), (10, 1): (8, 0, 9, 0)})).to_dict("records")
    assert row == {**RUN, "step": 10, "layer": 0, "place": "residual stream", "nan_count": 0, "inf_count": 2}


def test_every_run_has_a_row_and_the_order_is_kept():
    frame = pd.concat(
        [
            layers({(0, 0): (1, 0, 1, 0)}, configuration="b", seed=1),
            layers({}, configuration="b", seed=0),
            layers({(30, 2): (0, 0, 4, 0)}, configuration="a"),
        ]
    )
    found = first_nonfinite(frame)
    assert found[["configuration", "seed"]].to_numpy().tolist() == [["b", 1], ["b", 0], ["a", 0]]
    assert found["step"].tolist() == [0, pd.NA, 30]
    assert found.loc[1, ["step", "layer", "place", "nan_count", "inf_count"]].isna().all()
    assert found["step"].dtype == "Int64"


@pytest.mark.parametrize("value", [NAN, -1])
def test_a_missing_count_is_not_zero(value):
    frame = layers({})
    frame["scores_nan_count"] = frame["scores_nan_count"].astype(float)
    frame.loc[3, "scores_nan_count"] = value
    with pytest.raises(InputError, match="a count that is missing or negative"):
        first_nonfinite(frame)


def test_collapse_begins_where_entropy_falls_for_good():
    assert collapse_steps([3.9, 2.0, 0.39, 0.1, 0.05]) == (20, 0)
    assert collapse_steps([3.9, 2.0, 0.40, 0.1, 0.05]) == (30, 0)  # the threshold itself is not below it
    assert collapse_steps([3.9, 2.0, 0.39, 0.1, 0.05], share=0.5 + 1e-9) == (10, 0)
    assert collapse_steps([3.9, 3.8, 3.9]) == (None, 0)
    assert collapse_steps([0.1, 0.1]) == (0, 0)


def test_a_layer_that_recovers_has_not_collapsed():
    assert collapse_steps([3.9, 0.1, 0.1, 0.1, 2.0]) == (None, 0)
    assert collapse_steps([3.9, 0.1, 2.0, 0.1, 0.1]) == (30, 0)


def test_nan_is_no_collapse_and_is_counted_apart():
    assert collapse_steps([3.9, 3.0, NAN, NAN]) == (None, 2)
    assert collapse_steps([NAN, NAN]) == (None, 2)
    assert collapse_steps([3.9, 0.2, 0.1, NAN, NAN]) == (10, 2)
    assert collapse_steps([3.9, 0.2, NAN, 0.1]) == (10, 1)
    assert collapse_steps([3.9, 0.2, NAN, 3.0]) == (None, 1)
    assert collapse_steps([3.9, NAN, 0.1]) == (20, 1)


def test_layers_and_runs_are_apart():
    frame = pd.concat(
        [entropies([[3.9, 0.1], [0.1, 3.9]], seed=1), entropies([[NAN, NAN], [3.9, 0.3]], seed=0)], ignore_index=True
    )
    found = entropy_collapse(frame.sort_values("step", ascending=False, kind="stable"), 3.878)
    assert found[["seed", "layer", "nan_readings"]].to_numpy().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 2], [0, 1, 0]]
    assert found["step"].tolist() == [10, pd.NA, pd.NA, 10]


def test_the_documented_thresholds_in_keys():
    """exp(entropy) is the number of keys that uniform attention of that entropy is spread over."""
    bound = np.log(np.arange(1, 129)).mean()
    assert np.exp(0.1 * bound) == pytest.approx(1.5, abs=0.05)
    assert np.exp(0.25 * bound) == pytest.approx(2.6, abs=0.05)


@pytest.mark.parametrize(
    ("bound", "share", "says"),
    [(0.0, 0.1, "uniform bound is 0.0"), (NAN, 0.1, "uniform bound is nan"), (4.0, 1.0, "share of the uniform bound")],
)
def test_bad_thresholds(bound, share, says):
    with pytest.raises(InputError, match=says):
        entropy_collapse(entropies([[1.0]]), bound, share=share)


def test_missing_columns_and_doubled_rows():
    with pytest.raises(InputError, match="the layers frame lacks residual_inf_count"):
        first_nonfinite(layers({}).drop(columns="residual_inf_count"))
    with pytest.raises(InputError, match="more than one row"):
        entropy_collapse(pd.concat([entropies([[1.0]])] * 2), 4.0)
