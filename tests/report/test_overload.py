from typing import Any

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.report.overload import perplexity_and_overload


def curves(**changes: Any) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "line": ["SM+R", "SM+R", "SM+R", "SM+G"],
            "place": [2, 0, 1, 0],
            "value": ["0.1", "none", "0.01", "none"],
            "eval_ppl": [300.0, 100.0, np.nan, 120.0],
            "eval_ppl_low": [280.0, 90.0, np.nan, np.nan],
            "eval_ppl_high": [350.0, 110.0, np.nan, np.nan],
            "top_band": [0.25, 1.0, np.nan, 0.9],
        }
    )
    return frame.assign(**changes)


def test_both_panels_show_each_line_from_left_to_right_and_the_level() -> None:
    level = {"configuration": "SM+LN+G", "eval_ppl": 80.0, "top_band": 0.5}
    figure = perplexity_and_overload(curves(), changed="weight", level=level)
    perplexity, overload = figure.axes
    relu, gelu, dashed = overload.lines
    np.testing.assert_array_equal(relu.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(np.asarray(relu.get_ydata()), [100.0, np.nan, 25.0])
    np.testing.assert_allclose(np.asarray(gelu.get_ydata()), [90.0])
    assert set(np.asarray(dashed.get_ydata())) == {50.0}
    np.testing.assert_allclose(np.asarray(perplexity.lines[0].get_ydata(), dtype=np.float64), [100.0, np.nan, 300.0])
    bars: Any = perplexity.containers[0]
    first, _, last = bars.lines[2][0].get_segments()
    np.testing.assert_allclose(first, [[0, 90.0], [0, 110.0]])
    np.testing.assert_allclose(last, [[2, 280.0], [2, 350.0]])
    assert [tick.get_text() for tick in perplexity.get_xticklabels()] == ["none", "0.01", "0.1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SM+LN+G", "SM+R", "SM+G"]
    assert perplexity.get_xlabel() == overload.get_xlabel() == "weight"


def test_a_figure_of_diverged_runs_is_drawn() -> None:
    figure = perplexity_and_overload(curves(eval_ppl=np.nan, top_band=np.nan), changed="weight")
    figure.canvas.draw()
    assert all(np.isnan(line.get_ydata()).all() for line in figure.axes[1].lines)


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(InputError, match="lacks top_band"):
        perplexity_and_overload(curves().drop(columns="top_band"), changed="weight")
