"""Every figure of ``normfree.plot``: its docstring has the columns, and its errors name them."""

import inspect
import re
import sys
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from normfree import plot
from normfree.errors import InputError
from normfree.report.notebook import draw_figures_in_notebooks
from tests.report.study import head_entropy

FIGURES = [name for name in plot.__all__ if name != "save_figure"]
OPTIONS = {"bound": 1.0, "marked": {}, "mark": "GELU", "maximum": 1.0, "changed": "slope"}
NEEDED = re.compile(r"the (.+) frame lacks (.+); it needs the columns (.+)")


def frames_of(name):
    parameters = inspect.signature(getattr(plot, name)).parameters.values()
    return [each.name for each in parameters if each.annotation in (pd.DataFrame, "pd.DataFrame")]


def options_of(name):
    return {key: value for key, value in OPTIONS.items() if key in inspect.signature(getattr(plot, name)).parameters}


@pytest.mark.parametrize("name", FIGURES)
def test_columns_are_documented_and_missing_ones_are_named(name):
    figure, parameters = getattr(plot, name), frames_of(name)
    given = {parameter: pd.DataFrame({"other": [1]}) for parameter in parameters}
    named = []
    for parameter in parameters:  # frames are checked in the order of the parameters
        with pytest.raises(InputError, match="it needs the columns") as error:
            figure(**given, **options_of(name))
        needed = NEEDED.fullmatch(str(error.value))
        assert needed is not None
        columns = needed[3].split(", ")
        assert needed[2].split(", ") == columns
        for column in columns:
            assert re.search(rf"\b{column}\b", figure.__doc__), f"{column} of {parameter}"
        without_last = pd.DataFrame({column: [1] for column in columns[:-1]})
        with pytest.raises(InputError, match=rf"frame lacks {columns[-1]};"):
            figure(**{**given, parameter: without_last}, **options_of(name))
        given[parameter] = pd.DataFrame({column: [1] for column in columns})
        named.append(columns)
    assert named


def test_what_is_no_frame_is_refused():
    with pytest.raises(InputError, match="the head_entropy frame is a dict; give a DataFrame with model, "):
        plot.headwise_entropy_heatmaps({"layer": [0]})


def test_all_figures_of_the_reports_are_there():
    assert len(FIGURES) == len(set(FIGURES)) > 20
    for name in FIGURES:
        assert inspect.signature(getattr(plot, name)).return_annotation in (Figure, "Figure")
    assert isinstance(plot.headwise_entropy_heatmaps(head_entropy()), Figure)


class Formatter(dict[Any, Any]):
    """What IPython's formatter of PNG files is asked for."""

    def for_type(self, kind, function):
        self[kind] = function


def teach(shell):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
        draw_figures_in_notebooks()


def test_ipython_learns_to_draw_figures_once():
    formatter = Formatter()
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"image/png": formatter}))
    teach(shell)
    assert formatter[Figure](plot.headwise_entropy_heatmaps(head_entropy())).startswith(b"\x89PNG")
    formatter[Figure] = own = object()
    teach(shell)
    assert formatter[Figure] is own


@pytest.mark.parametrize("shell", [None, SimpleNamespace(display_formatter=None)])
def test_an_ipython_without_a_display_is_left_alone(shell):
    teach(shell)
