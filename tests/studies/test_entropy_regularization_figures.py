from typing import Any

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.studies.entropy_regularization import entropy_threshold_trajectories


def heads(**changes: Any) -> pd.DataFrame:
    grid = pd.MultiIndex.from_product(
        [[0, 1], [0, 10, 20], range(3), range(2)], names=["seed", "step", "layer", "head"]
    )
    frame = grid.to_frame(index=False).assign(model="m", context_length=16, configuration="SM+G, penalty")
    frame["entropy_nats"] = np.where(frame["step"] == 20, np.nan, 1.5 + 0.1 * frame["seed"])
    frame["entropy_threshold_nats"] = 0.5 + 0.01 * frame["step"] + frame["head"] + 0.2 * frame["seed"]
    return frame.assign(**changes)


def test_a_panel_shows_both_lines_of_each_head_as_means_over_seeds() -> None:
    figure = entropy_threshold_trajectories(heads(), bound=2.0)
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1", "layer 2"]
    for axes in panels:
        first, _, threshold, second_threshold, bound = axes.lines
        assert first.get_linestyle() == "-"
        np.testing.assert_allclose(np.asarray(first.get_ydata())[:2], 1.55)
        assert np.isnan(np.asarray(first.get_ydata())[2])
        np.testing.assert_allclose(np.asarray(threshold.get_ydata()), [0.6, 0.7, 0.8])
        np.testing.assert_allclose(np.asarray(second_threshold.get_ydata()), [1.6, 1.7, 1.8])
        assert set(np.asarray(bound.get_ydata())) == {2.0}
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"attention entropy", "learned threshold", "uniform attention, 2.00"}


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(InputError, match="has no rows"):
        entropy_threshold_trajectories(heads().iloc[:0], bound=2.0)
    with pytest.raises(InputError, match="lacks entropy_threshold_nats"):
        entropy_threshold_trajectories(heads().drop(columns="entropy_threshold_nats"), bound=2.0)
    two = pd.concat([heads(), heads(configuration="SM+R, penalty")])
    with pytest.raises(InputError, match="has several configurations"):
        entropy_threshold_trajectories(two, bound=2.0)
