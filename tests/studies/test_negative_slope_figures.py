from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh

from normfree.errors import InputError
from normfree.report import save_figure
from normfree.studies.negative_slope.figures import instability_dynamics

from .test_negative_slope_events import entropies, layers

NAN = float("nan")


def frames(seeds=(0,)):
    """Two configurations, three layers; the second has NaNs in layer 2 from step 20 on."""
    broken = {(20, 2): (0, 4, 6, 0), (30, 2): (10, 0, 0, 990)}
    counts, entropy = [], []
    for seed in seeds:
        run: dict[str, Any] = {"seed": seed, "configuration": "SM+R"}
        counts.append(layers({}, **run))
        entropy.append(entropies([[3.8, 3.7, 3.6, 3.5]] * 3, **run))
        run = {"seed": seed, "configuration": "SM+L 0.2"}
        counts.append(layers(broken if seed == 0 else {}, **run))
        entropy.append(entropies([[3.8, 3.7, 3.6, 3.5]] * 2 + [[3.8, 0.5, NAN if seed == 0 else 0.1, 0.1]], **run))
    return pd.concat(counts), pd.concat(entropy)


def meshes(figure):
    """The counts of each row of panels; the colour bars have meshes too, but no label "layer"."""
    panels = [axes for axes in figure.axes if axes.get_ylabel() == "layer" and axes.get_xlim()[1] > 1]
    return [next(each for each in axes.collections if isinstance(each, QuadMesh)) for axes in panels]


def entropy_panels(figure):
    return [axes for axes in figure.axes if axes.get_ylabel() == "entropy (nats)"]


def test_a_row_each_configuration_on_shared_scales():
    figure = instability_dynamics(*frames(), bound=3.878)
    quiet, broken = meshes(figure)
    assert np.ma.getmaskarray(quiet.get_array()).all()
    expected = np.zeros((3, 4))
    expected[2, 2:] = 10, 1000
    np.testing.assert_array_equal(np.ma.filled(broken.get_array(), 0), expected)
    assert quiet.norm is broken.norm
    assert (broken.norm.vmin, broken.norm.vmax) == (1, 1000)
    panels = entropy_panels(figure)
    assert len({axes.get_ylim() for axes in panels}) == len({axes.get_xlim() for axes in panels}) == 1
    assert panels[0].get_ylim()[1] > 3.878
    labels = {axes.get_ylabel() for axes in figure.axes} | {axes.get_xlabel() for axes in figure.axes}
    assert {"layer", "entropy (nats)", "training step"} <= labels
    names = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"SM+R", "SM+L 0.2", "none"} <= set(names)


def test_lines_are_the_entropies_and_only_nan_steps_are_hatched():
    panels = entropy_panels(instability_dynamics(*frames(), bound=3.878))
    lines = [line for line in panels[1].lines if line.get_linestyle() == "-"]
    np.testing.assert_array_equal(lines[2].get_ydata(), [3.8, 0.5, NAN, 0.1])
    np.testing.assert_array_equal(lines[2].get_xdata(), [0, 10, 20, 30])
    (hatched,) = panels[1].patches
    assert (hatched.get_x(), hatched.get_width()) == (15, 10)
    assert not panels[0].patches


def test_several_seeds_are_averaged_and_a_nan_seed_breaks_the_mean():
    figure = instability_dynamics(*frames(seeds=(0, 1)), bound=3.878)
    assert np.ma.filled(meshes(figure)[1].get_array(), 0)[2].tolist() == [0, 0, 5, 500]
    lines = [line for line in entropy_panels(figure)[1].lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose(lines[2].get_ydata(), [3.8, 0.5, NAN, 0.1])
    assert "training step (mean over 2 seeds)" in [axes.get_xlabel() for axes in figure.axes]


@pytest.mark.parametrize("steps", [[0], [0, 10]])
@pytest.mark.parametrize("nan", [True, False])
def test_few_steps_all_nan_or_none(tmp_path, steps, nan):
    counts, entropy = (frame[frame["step"].isin(steps)].copy() for frame in frames())
    if nan:
        counts["residual_nan_count"] = 7
        entropy["entropy_nats"] = NAN
    paths = save_figure(instability_dynamics(counts, entropy, bound=3.878), tmp_path, "instability")
    assert all(path.stat().st_size > 0 for path in paths)


def test_frames_of_different_configurations_are_refused():
    counts, entropy = frames()
    with pytest.raises(InputError, match="other configurations"):
        instability_dynamics(counts, entropy[entropy["configuration"] == "SM+R"], bound=3.878)
    with pytest.raises(InputError, match="mixes several models"):
        instability_dynamics(counts.assign(model=["a", "b"] * 12), entropy, bound=3.878)
