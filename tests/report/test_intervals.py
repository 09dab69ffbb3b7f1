import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from normfree.errors import InputError
from normfree.report import band_shares, mean_confidence_interval, paired_difference, published_head_entropy

from . import study


def test_interval_by_hand():
    estimate = mean_confidence_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305284263 * math.sqrt(5 / 3) / 2  # t(0.975, 3) times the standard error
    assert estimate.mean == 2.5
    assert estimate.low == pytest.approx(2.5 - half, rel=1e-12)
    assert estimate.high == pytest.approx(2.5 + half, rel=1e-12)
    assert estimate.n == 4


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_is_that_of_scipys_t_test(values, level):
    estimate = mean_confidence_interval(values, level)
    assert estimate.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-12)
    standard_error = stats.sem(values)
    if standard_error > 1e-9:
        low, high = stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=standard_error)
        assert estimate.low == pytest.approx(low, rel=1e-9, abs=1e-9)
        assert estimate.high == pytest.approx(high, rel=1e-9, abs=1e-9)


def test_one_value_has_no_interval():
    estimate = mean_confidence_interval([3.0])
    assert (estimate.mean, estimate.n) == (3.0, 1)
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_nan_is_not_averaged_over():
    estimate = mean_confidence_interval([1.0, float("nan"), 2.0])
    assert math.isnan(estimate.mean)
    assert math.isnan(estimate.low)
    assert estimate.n == 3


@pytest.mark.parametrize(("values", "level", "message"), [([], 0.95, "at least one"), ([1.0], 95, "between 0 and 1")])
def test_interval_of_nonsense(values, level, message):
    with pytest.raises(InputError, match=message):
        mean_confidence_interval(values, level)


def _losses(frame, configuration, seed):
    rows = frame[(frame["configuration"] == configuration) & (frame["seed"] == seed)]
    return rows.sort_values("sequence")["loss_nats"].to_numpy()


def test_one_seed_is_paired_by_sequence():
    frame = study.sequence_losses()
    difference = paired_difference(frame.sample(frac=1, random_state=0), "SM+LN+G")["SM+G"]
    reference = stats.ttest_rel(_losses(frame, "SM+G", 0), _losses(frame, "SM+LN+G", 0)).confidence_interval(0.95)
    assert difference.over == "sequences"
    assert difference.n == 50
    assert (difference.low, difference.high) == pytest.approx((reference.low, reference.high), rel=1e-10)


def test_several_seeds_are_paired_by_seed():
    frame = study.sequence_losses(seeds=(0, 1, 2))
    difference = paired_difference(frame, "SM+LN+G", 0.9)["SM+R"]
    means = [[_losses(frame, name, seed).mean() for seed in (0, 1, 2)] for name in ("SM+R", "SM+LN+G")]
    reference = stats.ttest_rel(*means).confidence_interval(0.9)
    assert difference.over == "seeds"
    assert difference.n == 3
    assert difference.mean == pytest.approx(np.mean(means[0]) - np.mean(means[1]), rel=1e-10)
    assert (difference.low, difference.high) == pytest.approx((reference.low, reference.high), rel=1e-10)


def test_only_seeds_of_both_are_pairs():
    frame = study.sequence_losses(seeds=(0, 1, 2))
    frame = frame[(frame["configuration"] != "SM+G") | (frame["seed"] != 1)]
    differences = paired_difference(frame, "SM+LN+G")
    assert differences["SM+G"].n == 2
    assert differences["SM+R"].n == 3
    assert "SM+LN+G" not in differences


def test_nan_losses_make_the_difference_nan():
    differences = paired_difference(study.sequence_losses((0, 1, 2), nan_run=("SM+G", 2)), "SM+LN+G")
    assert math.isnan(differences["SM+G"].mean)
    assert differences["SM+G"].n == 3
    assert math.isfinite(differences["SM+R"].mean)


def test_pairs_that_do_not_match():
    frame = study.sequence_losses()
    with pytest.raises(InputError, match=r"49 of 50 sequences for 'SM\+R' \(seed 0\)"):
        paired_difference(frame.iloc[:-1], "SM+LN+G")
    with pytest.raises(InputError, match=r"unknown baseline configuration 'GELU'.*allowed: SM\+LN\+G"):
        paired_difference(frame, "GELU")
    with pytest.raises(InputError, match="more than one row for configuration SM\\+LN\\+G, seed 0, sequence 0"):
        paired_difference(frame.iloc[[0, *range(len(frame))]], "SM+LN+G")
    shifted = frame.assign(seed=frame["configuration"].map({"SM+LN+G": 1}).fillna(0))
    with pytest.raises(InputError, match="no seed in common"):
        paired_difference(shifted, "SM+LN+G")
    with pytest.raises(InputError, match="lacks loss_nats"):
        paired_difference(frame.drop(columns="loss_nats"), "SM+LN+G")


def test_bands_by_hand():
    frame = study.head_entropy(n_layer=1, n_head=4)
    # The maximum over all configurations is 4, so the edges are 1, 2 and 3.
    frame["entropy_nats"] = [0.5, 0.9, 1.0, 2.5] + [0.0, 0.1, 0.2, 3.0] + [3.5, 3.9, 4.0, 2.0] + [1.5] * 4
    shares = band_shares(frame).set_index("configuration")[["band_1", "band_2", "band_3", "band_4"]]
    assert list(shares.loc["SM+LN+G"]) == [0.5, 0.25, 0.25, 0.0]
    assert list(shares.loc["SM+LN+R"]) == [0.75, 0.0, 0.0, 0.25]
    assert list(shares.loc["SM+G"]) == [0.0, 0.0, 0.25, 0.75]
    assert list(shares.loc["SM+R"]) == [0.0, 1.0, 0.0, 0.0]


def test_the_maximum_is_that_of_the_same_seed():
    frame = study.head_entropy(n_layer=1, n_head=2, seeds=(0, 1))
    frame["entropy_nats"] = np.where(frame["seed"] == 0, 4.0, 1.0)
    shares = band_shares(frame)
    assert shares["band_4"].tolist() == [1.0] * 8
    assert sorted(set(shares["maximum_nats"])) == [1.0, 4.0]


def test_a_run_with_nan_has_nan_shares_and_the_others_keep_theirs():
    frame = study.head_entropy(seeds=(0, 1))
    whole = band_shares(frame).set_index(["configuration", "seed"])
    frame.loc[(frame["configuration"] == "SM+R") & (frame["seed"] == 1) & (frame["layer"] == 2), "entropy_nats"] = (
        np.nan
    )
    shares: Any = band_shares(frame).set_index(["configuration", "seed"])
    assert shares.loc[("SM+R", 1), "nan_heads"] == 4
    assert shares.loc[("SM+R", 1), ["band_1", "band_4"]].isna().all()
    pd.testing.assert_frame_equal(shares.loc[[("SM+R", 0)]], whole.loc[[("SM+R", 0)]])


def test_published_heatmaps_give_the_papers_shares():
    """Section 3: 58 % of heads in the top band for SM+G, 23 % for SM+R; the printed values give 57.6 and 22.2."""
    shares = band_shares(published_head_entropy()).set_index("configuration")["band_4"]
    assert shares["SM+G"] == pytest.approx(83 / 144)
    assert shares["SM+R"] == pytest.approx(32 / 144)
