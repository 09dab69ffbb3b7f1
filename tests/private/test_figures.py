from typing import Any

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree_private.figures import (
    alternatives_bytes,
    cost_by_operation,
    pareto_front,
    perplexity_against_bytes,
)
from tests.report.test_gallery import faults

MODELS = ("SM+LN+G", "SM+R", "other")
PROTOCOLS = ("SEMI2K", "ABY3")
GROUPS = ("linear", "norm", "activation")
COSTS = (("bytes_sent", "sent by a party (MB)", 1e6), ("messages_sent", "messages sent by a party", 1))


def group_costs():
    index = pd.MultiIndex.from_product([MODELS, PROTOCOLS, GROUPS], names=["model", "protocol", "group"])
    bytes_sent = np.linspace(1e6, 9e7, len(index))
    return pd.DataFrame({"bytes_sent": bytes_sent, "messages_sent": bytes_sent[::-1] / 1e5}, index=index).reset_index()


def points():
    return pd.DataFrame(
        {
            "model": list("abcde") * 2,
            "protocol": ["SEMI2K"] * 5 + ["ABY3"] * 5,
            "bytes_sent": [1e6, 2e6, 3e6, 4e6, 5e6] * 2,
            "eval_ppl": [90.0, 95.0, 80.0, np.nan, 80.0] * 2,
        }
    )


def alternatives():
    labels = [("norm", "LayerNorm"), ("norm", "DyT"), ("activation", "ReLU"), ("activation", "GELU")]
    return pd.DataFrame(
        [
            {"protocol": protocol, "group": group, "label": label, "bytes_sent": 1e6 * 3 ** (i + j)}
            for j, protocol in enumerate(PROTOCOLS)
            for i, (group, label) in enumerate(labels)
        ]
    )


def test_bars_are_the_costs_end_to_end_on_one_scale_a_row():
    frame = group_costs()
    figure = cost_by_operation(frame)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == list(MODELS)
    assert [axes.get_title() for axes in figure.axes[:2]] == list(PROTOCOLS)
    panels = zip(figure.axes, [(*each, protocol) for each in COSTS for protocol in PROTOCOLS], strict=True)
    for axes, (column, label, unit, protocol) in panels:
        assert axes.get_xlabel() == label
        for row, model in enumerate(MODELS):
            own = frame[(frame["model"] == model) & (frame["protocol"] == protocol)]
            widths = own.set_index("group")[column].reindex(GROUPS) / unit
            bars = bars_of(axes, row)
            np.testing.assert_allclose([bar.get_width() for bar in bars], widths)
            np.testing.assert_allclose([bar.get_x() for bar in bars], [0, *widths.cumsum()[:-1]])
            total = widths.sum()
            assert f"{total:,.{0 if total >= 100 else 1}f}" in [text.get_text() for text in axes.texts]
    for left, right in (figure.axes[:2], figure.axes[2:]):
        assert left.get_xlim() == right.get_xlim()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(GROUPS)


def test_a_group_that_a_model_lacks_is_nothing():
    frame = group_costs()
    axes = cost_by_operation(frame[~((frame["model"] == "SM+R") & (frame["group"] == "norm"))]).axes[0]
    assert bars_of(axes, 1)[1].get_width() == 0


def bars_of(axes, row):
    return [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == row]


def test_the_front_is_what_none_beats_in_both():
    assert pareto_front(points().query("protocol == 'ABY3'"))["model"].tolist() == ["a", "c"]


def test_models_are_points_and_the_front_a_line():
    figure = perplexity_against_bytes(points())
    for axes in figure.axes:
        front, *models = axes.lines
        np.testing.assert_allclose(np.asarray(front.get_xdata()), [1, 3])
        np.testing.assert_allclose(np.asarray(front.get_ydata()), [90, 80])
        assert [tuple(np.asarray(line.get_xydata())[0]) for line in models] == [(1, 90), (2, 95), (3, 80), (5, 80)]
        assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "e"]
    assert figure.axes[0].get_ylabel() == "perplexity"


def widths(axes: Any) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def test_alternatives_are_logarithmic_bars_by_protocol():
    norms, activations = alternatives_bytes(alternatives()).axes
    assert (norms.get_title(), activations.get_title()) == ("norms", "activations")
    assert [tick.get_text() for tick in norms.get_yticklabels()] == ["LayerNorm", "DyT"]
    np.testing.assert_allclose(widths(norms), [1, 3, 3, 9])
    np.testing.assert_allclose(widths(activations), [9, 27, 27, 81])
    assert norms.get_xscale() == "log"
    assert norms.get_xlim() == activations.get_xlim()


def test_numbers_of_three_protocols_keep_apart():
    labels = [("norm", name) for name in ("layernorm", "rmsnorm", "dyt", "derf")] + [("activation", "gelu")]
    rows = [
        {"protocol": protocol, "group": group, "label": label, "bytes_sent": 1e8 + 1e6 * i}
        for i, protocol in enumerate(("SEMI2K", "ABY3", "CHEETAH"))
        for group, label in labels
    ]
    assert faults(alternatives_bytes(pd.DataFrame(rows))) == []


@pytest.mark.parametrize(
    ("figure", "frame"),
    [(cost_by_operation, group_costs()), (perplexity_against_bytes, points()), (alternatives_bytes, alternatives())],
)
def test_bad_frames(figure, frame):
    with pytest.raises(InputError, match="lacks bytes_sent"):
        figure(frame.drop(columns="bytes_sent"))
    with pytest.raises(InputError, match="more than one row"):
        figure(pd.concat([frame, frame]))
