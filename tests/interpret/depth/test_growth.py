import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from normfree.interpret import fit_growth

N_LAYER = 16
DEPTH = np.arange(1, N_LAYER + 1, dtype=np.float64)
LAWS = {
    "constant": np.full(N_LAYER, 0.7),
    "linear": 0.3 + 0.5 * DEPTH,
    "power law": 0.4 * DEPTH**1.8,
    "exponential": 0.05 * np.exp(0.4 * DEPTH),
}
PARAMETERS = {"constant": (0.7, np.nan), "linear": (0.3, 0.5), "power law": (0.4, 1.8), "exponential": (0.05, 0.4)}


def best(frame):
    (row,) = frame[frame["is_best"]].to_dict("records")
    return row


@pytest.mark.parametrize("law", LAWS)
def test_exact_data_name_their_law_and_give_back_its_parameters(law):
    frame, fitted = fit_growth(LAWS[law])
    found = best(frame)
    assert found["law"] == law == frame["law"].iloc[0]
    assert found["is_distinct"]
    np.testing.assert_allclose((found["scale"], found["rate"]), PARAMETERS[law], rtol=1e-6)
    np.testing.assert_allclose(fitted, LAWS[law], rtol=1e-8)


@pytest.mark.parametrize("law", LAWS)
def test_noisy_data_name_their_law_and_intervals_hold_its_parameters_as_often_as_they_say(law):
    draw = np.random.default_rng(0)
    frames = [fit_growth(LAWS[law] * np.exp(0.05 * draw.standard_normal(N_LAYER)))[0] for _ in range(80)]
    right = np.mean([frame["law"].iloc[0] == law for frame in frames])
    # With 16 layers and this noise, a line and a power law can look alike; and a penalty for one more parameter lets
    # noise look like growth now and then, however many layers there are.
    assert right > (0.6 if law == "constant" else 0.9)
    assert np.mean([frame["law"].iloc[0] != law and frame["is_distinct"].iloc[0] for frame in frames]) < 0.12
    fits = [frame.set_index("law").loc[law] for frame in frames]
    for name, value in zip(("scale", "rate"), PARAMETERS[law], strict=True):
        if not np.isnan(value):
            inside = np.mean([fit[f"{name}_low"] < value < fit[f"{name}_high"] for fit in fits])
            assert 0.90 < inside < 0.99
    np.testing.assert_allclose(np.mean([fit["log_std"] ** 2 for fit in fits]), 0.05**2, rtol=0.1)


def test_power_law_is_the_regression_of_logarithms():
    variance = LAWS["power law"] * np.exp(0.1 * np.random.default_rng(5).standard_normal(N_LAYER))
    expected = stats.linregress(np.log(DEPTH), np.log(variance))
    found = fit_growth(variance)[0].set_index("law").loc["power law"]
    np.testing.assert_allclose(found["rate"], expected.slope)
    np.testing.assert_allclose(found["scale"], np.exp(expected.intercept))
    half = stats.t.ppf(0.975, N_LAYER - 2) * expected.stderr
    np.testing.assert_allclose((found["rate_low"], found["rate_high"]), (expected.slope - half, expected.slope + half))
    residuals = np.log(variance) - expected.intercept - expected.slope * np.log(DEPTH)
    n, k = N_LAYER, 3
    aicc = n * np.log(residuals @ residuals / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    np.testing.assert_allclose(found["aicc"], aicc)


def test_linear_law_is_the_least_sum_of_squares_of_logarithms():
    variance = LAWS["linear"] * np.exp(0.2 * np.random.default_rng(6).standard_normal(N_LAYER))
    found = fit_growth(variance)[0].set_index("law").loc["linear"]

    def squares(scale, rate):
        return np.square(np.log(variance) - np.log(scale + rate * DEPTH)).sum()

    least = squares(found["scale"], found["rate"])
    np.testing.assert_allclose(found["log_std"], np.sqrt(least / (N_LAYER - 2)))
    for scale, rate in ((1.001, 1), (0.999, 1), (1, 1.001), (1, 0.999), (1.01, 0.99), (0.99, 1.01)):
        assert squares(scale * found["scale"], rate * found["rate"]) > least


@given(st.lists(st.floats(-30, 30), min_size=5, max_size=30))
def test_any_positive_variances_are_fitted(logarithms):
    frame, fitted = fit_growth(np.exp(np.array(logarithms)))
    assert frame["is_best"].sum() == 1
    assert frame["is_best"].iloc[0]
    assert (np.diff(frame["aicc"]) >= 0).all()
    np.testing.assert_allclose(frame["akaike_weight"].sum(), 1)
    assert (fitted > 0).all()


@pytest.mark.parametrize("variance", [DEPTH[:4], np.r_[DEPTH, np.nan], np.r_[DEPTH, np.inf], np.r_[0.0, DEPTH]])
def test_no_law_for_few_layers_or_for_what_is_not_positive(variance):
    frame, fitted = fit_growth(variance)
    assert not frame["is_best"].any()
    assert frame["scale"].isna().all()
    assert np.isnan(fitted).all()
