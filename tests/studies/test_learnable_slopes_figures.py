import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.studies.learnable_slopes import (
    entropy_trajectory_distance,
    negative_slope_trajectories,
    slope_under_decay_only,
    trajectory_distance_matrix,
)

SETTING = {"model": "tiny", "context_length": 16}


def trajectories(offsets: dict[tuple[str, int], float]) -> pd.DataFrame:
    """For each (configuration, seed) two layers at three steps: layer + step / 10 + offset."""
    return pd.DataFrame(
        [
            {
                **SETTING,
                "configuration": configuration,
                "seed": seed,
                "step": step,
                "layer": layer,
                "entropy_nats": layer + step / 10 + offset,
            }
            for (configuration, seed), offset in offsets.items()
            for step in (0, 5, 10)
            for layer in (0, 1)
        ]
    )


def test_a_constant_shift_is_its_own_distance() -> None:
    frame = trajectories({("A", 0): 0.0, ("A", 1): 0.3, ("B", 0): 0.1, ("B", 1): 0.5})
    distances = entropy_trajectory_distance(frame)
    np.testing.assert_allclose(distances["B"]["A"], (0.1 + 0.2) / 2)  # seed by seed
    np.testing.assert_allclose(distances["A"]["B"], distances["B"]["A"])
    np.testing.assert_allclose(distances["A"]["A"], 0.3)  # between seeds
    np.testing.assert_allclose(distances["B"]["B"], 0.4)


def test_the_distance_is_the_root_mean_square_over_steps_and_layers() -> None:
    frame = trajectories({("A", 0): 0.0, ("B", 0): 0.0})
    draw = np.random.default_rng(3)
    frame["entropy_nats"] += draw.normal(size=len(frame))
    a, b = (frame.loc[frame["configuration"] == name, "entropy_nats"].to_numpy() for name in "AB")
    expected = np.sqrt(((a - b) ** 2).mean())
    distances = entropy_trajectory_distance(frame.sample(frac=1, random_state=0))
    np.testing.assert_allclose(distances["B"]["A"], expected, rtol=1e-12)


def test_one_seed_has_no_yardstick_and_a_nan_no_distance() -> None:
    frame = trajectories({("A", 0): 0.0, ("B", 0): 0.1, ("C", 0): np.nan})
    distances = entropy_trajectory_distance(frame)
    assert np.isnan(np.diag(distances)).all()
    assert np.isnan(distances["C"]["A"])
    assert np.isfinite(distances["B"]["A"])
    trajectory_distance_matrix(distances).canvas.draw()


def test_configurations_without_a_common_seed_have_no_distance() -> None:
    distances = entropy_trajectory_distance(trajectories({("A", 0): 0.0, ("B", 1): 0.0, ("C", 1): 0.5}))
    assert np.isnan(distances["A"]["B"])
    assert distances["B"]["C"] == pytest.approx(0.5)


def test_what_cannot_be_paired_is_refused() -> None:
    frame = trajectories({("A", 0): 0.0, ("B", 0): 0.0})
    with pytest.raises(InputError, match="different steps or layers"):
        entropy_trajectory_distance(frame.drop(index=0))


def test_decay_alone_is_the_product_of_the_steps_factors() -> None:
    rates = np.linspace(1e-3, 1e-4, 40)
    logged = pd.Series(rates, index=np.arange(1, 41))
    path = slope_under_decay_only(0.25, logged, 0.1)
    slope, expected = 0.25, [0.25]
    for rate in rates:
        slope -= rate * 0.1 * slope
        expected.append(slope)
    np.testing.assert_allclose(path.to_numpy(), expected, rtol=1e-12)
    assert path.index.tolist() == list(range(41))
    assert (slope_under_decay_only(0.25, logged, 0.0) == 0.25).all()
    every_tenth = slope_under_decay_only(0.25, pd.Series(1e-3, index=[10, 20, 30]), 0.1)
    np.testing.assert_allclose(every_tenth.iloc[-1], 0.25 * (1 - 1e-4) ** 30, rtol=1e-12)


def test_the_panels_show_each_layers_slope() -> None:
    slopes = trajectories({("layerwise 0.25", 0): 0.2, ("global 0.25", 0): 0.1}).rename(
        columns={"entropy_nats": "negative_slope"}
    )
    alone = pd.DataFrame({"configuration": "global 0.25", "step": [0, 10], "negative_slope": [0.25, 0.2]})
    figure = negative_slope_trajectories(slopes, decay_only=alone, n_columns=2)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(panels) == {"layerwise 0.25", "global 0.25"}
    drawn = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in panels["layerwise 0.25"].lines[:2]]
    np.testing.assert_allclose(drawn, [[0.2, 0.7, 1.2], [1.2, 1.7, 2.2]])
    assert "dashed" in figure.get_supxlabel()
