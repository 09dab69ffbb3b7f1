import dataclasses

import numpy as np
import pytest

from normfree.interpret import effective_depth


def by_sequence(increases, n=4):
    return np.repeat(np.array(increases, dtype=np.float64)[:, None], n, axis=1)


@pytest.mark.parametrize(
    ("increases", "depth", "useful", "deep", "nats"),
    [
        ([1, 1, 1, 1], 4, 4, 0.5, 1),
        ([3, 0, 0, 0], 1, 1, 0, 0),
        ([0, 0, 2, 2], 2, 2, 1, 2),
        ([3, 1, -5, 0], 16 / 10, 2, 0, -2.5),
        ([100, 0.5, 2, 1, 0], 103.5**2 / (100**2 + 0.25 + 4 + 1), 3, 1 / 103.5, 0.5),
    ],
)
def test_closed_forms(increases, depth, useful, deep, nats):
    found = effective_depth(by_sequence(increases))
    np.testing.assert_allclose(found.effective_depth, depth)
    assert found.useful_layers == useful
    np.testing.assert_allclose(found.deep_half_share, deep)
    np.testing.assert_allclose(found.deep_layer_nats, nats)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-12)


def test_layers_that_cost_nothing_and_losses_that_are_not_finite():
    nothing = effective_depth(by_sequence([0, -1, 0]))
    assert (nothing.effective_depth, nothing.useful_layers) == (0, 0)
    assert np.isnan(nothing.deep_half_share)
    broken = effective_depth(by_sequence([1, np.nan, 2]))
    assert np.isnan(dataclasses.astuple(broken)).all()
    assert np.isnan(effective_depth(by_sequence([1, 2], n=1)).standard_error)
    assert np.isnan(effective_depth(by_sequence([1])).deep_layer_nats)


def test_standard_error_is_the_spread_of_repeated_draws():
    draw = np.random.default_rng(0)
    mean = np.array([2.0, 1.0, 0.6, 0.3])[:, None]
    found = [effective_depth(mean + 0.5 * draw.standard_normal((4, 50))) for _ in range(300)]
    spread = np.std([each.effective_depth for each in found], ddof=1)
    np.testing.assert_allclose(np.mean([each.standard_error for each in found]), spread, rtol=0.12)
