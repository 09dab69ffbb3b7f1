import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.interpret.figures import first_token_over_depth

MODELS = {"small": (18, 4), "deep": (30, 9)}


def stds():
    rows = []
    for model, (n_layer, _) in MODELS.items():
        for layer in range(n_layer):
            others = 1.0 + layer
            first = others * (100 if layer > 5 else 1)
            span = {"others_median": others, "others_min": others / 2, "others_max": 2 * others}
            rows.append({"model": model, "layer": layer, "first": first, **span})
    return pd.DataFrame(rows)


def sinks():
    return pd.DataFrame(
        [
            {"model": model, "layer": layer, "head": head, "sink_share": head / 10}
            for model, (n_layer, n_head) in MODELS.items()
            for layer in range(n_layer)
            for head in range(n_head)
        ]
    )


def lines(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line


def test_a_column_a_model_shows_both_stds_and_every_head():
    figure = first_token_over_depth(stds(), sinks())
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == list(MODELS)
    for axes, (n_layer, _) in zip(above, MODELS.values(), strict=True):
        first, others = lines(axes, "first token"), lines(axes, "all other tokens: median, range")
        np.testing.assert_allclose(first.get_ydata(), [(1 + n) * (100 if n > 5 else 1) for n in range(n_layer)])
        np.testing.assert_allclose(others.get_ydata(), 1.0 + np.arange(n_layer))
    for axes, (n_layer, n_head) in zip(below, MODELS.values(), strict=True):
        assert len(lines(axes, "a head").get_ydata()) == n_layer * n_head
        np.testing.assert_allclose(lines(axes, "mean over heads").get_ydata(), (n_head - 1) / 20)
    assert above[0].get_yscale() == "log"
    assert len(figure.legends) == 1


def test_what_is_not_finite_breaks_the_line():
    table = stds()
    table.loc[3, "first"] = np.inf
    table.loc[4, ["others_median", "others_min", "others_max"]] = np.nan
    shares = sinks()
    shares.loc[0, "sink_share"] = np.nan
    figure = first_token_over_depth(table, shares)
    assert np.isnan(lines(figure.axes[0], "first token").get_ydata()[3])
    assert np.isnan(lines(figure.axes[0], "all other tokens: median, range").get_ydata()[4])
    np.testing.assert_allclose(lines(figure.axes[2], "mean over heads").get_ydata()[0], 0.2)


def test_frames_that_do_not_fit():
    with pytest.raises(InputError, match="the residual stds frame lacks first"):
        first_token_over_depth(stds().drop(columns="first"), sinks())
    with pytest.raises(InputError, match="the sinks frame has more than one row for model small, layer 0, head 0"):
        first_token_over_depth(stds(), pd.concat([sinks(), sinks()]))
    with pytest.raises(InputError, match="the sinks frame has no rows of the model 'deep'"):
        first_token_over_depth(stds(), sinks().query("model == 'small'"))
