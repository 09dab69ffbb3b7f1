"""What all figures rely on: panels, labels that fit, and axes with room, for models of any depth."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from normfree.report.entropy_figures import headwise_entropy_distribution, headwise_entropy_heatmaps
from normfree.report.primitives import (
    MOST_TOGETHER,
    annotated_heatmap,
    colour_bar,
    colour_families,
    configuration_curves,
    integer_axis,
    layer_curves,
    panel_grid,
    title_panel,
    turns,
)
from normfree.report.style import TWO_COLUMN, depth_colours, entropy_colours, paper_style
from normfree.studies.hybrid_activations import layer_entropy_by_configuration

from . import study

DEPTHS = (1, 2, 6, 12, 30)


def extents(figure, artists):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return [each.get_window_extent(renderer) for each in artists]


def apart(boxes):
    return not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def on_the_page(figure, boxes):
    return all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize("n_layer", DEPTHS)
def test_the_labels_of_a_colour_bar_keep_apart_at_any_depth(n_layer):
    frame = study.head_entropy(n_layer, 4)
    figure = headwise_entropy_heatmaps(frame, maximum=3.878)
    bar = next(axes for axes in figure.axes if axes.get_ylabel() == "attention entropy (nats)")
    ticks = [label for label in bar.get_yticklabels() if label.get_text()]
    boxes = extents(figure, [bar.texts[0], bar.yaxis.label, *ticks])
    assert bar.texts[0].get_text() == "uniform 3.88"
    assert on_the_page(figure, boxes)
    low, high = bar.get_ylim()
    shown = [box for box, tick in zip(boxes[2:], ticks, strict=True) if low <= tick.get_position()[1] <= high]
    assert len(shown) > 1
    assert apart([*boxes[:2], *shown])


@pytest.mark.parametrize("n_layer", DEPTHS)
def test_entropy_by_layer_fits_a_page_and_writes_numbers_where_there_is_room(n_layer):
    frame = study.head_entropy(n_layer, 2)
    figure = layer_entropy_by_configuration(frame, marked={"SM+G": range(n_layer)}, mark="GELU", maximum=3.9)
    assert figure.get_figwidth() <= TWO_COLUMN
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text().strip("\N{BULLET} ")]
    assert len(texts) == (4 * n_layer if n_layer <= 12 else 0)
    assert sum("\N{BULLET}" in text.get_text() for text in axes.texts) == n_layer
    boxes = extents(figure, [*texts, axes.xaxis.label, figure.axes[1].yaxis.label])
    assert on_the_page(figure, boxes)
    assert apart(boxes)


@pytest.mark.parametrize("height", [0.9, 1.4, 3.0])
def test_a_colour_bar_breaks_a_label_that_is_longer_than_the_figure(height):
    label = "angular distance, last token (units of π)"
    with paper_style():
        figure, grid = panel_grid(4, 4, row_height=height)
        bar = colour_bar(figure, grid, Normalize(0, 1), entropy_colours(), label)
    assert bar.ax.get_ylabel().replace("\n", " ") == label
    (box,) = extents(figure, [bar.ax.yaxis.label])
    assert on_the_page(figure, [box])
    assert min(map(len, bar.ax.get_ylabel().split("\n"))) > 5


@pytest.mark.parametrize("n_configuration", [2, 4, 5, 9, 14])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_numbers_above_bars_keep_apart_where_all_heads_are_in_one_band(n_configuration, seeds):
    index = [(f"norm {i}", seed, head) for i in range(n_configuration) for seed in seeds for head in range(3)]
    frame = pd.DataFrame(index, columns=["configuration", "seed", "head"])
    figure = headwise_entropy_distribution(frame.assign(**study.SETTING, layer=0, entropy_nats=2.5))
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts].count("100") == n_configuration
    assert apart(extents(figure, texts))


def test_panels_without_use_are_hidden_and_the_ones_above_them_have_labels():
    _, grid = panel_grid(5, 3, row_height=1.0, sharex=True)
    assert grid.shape == (2, 3)
    assert [axes.get_visible() for axes in grid.flat] == [True] * 5 + [False]
    assert [axes.xaxis.majorTicks[0].label1.get_visible() for axes in grid[0]] == [False, False, True]
    _, single = panel_grid(1, 4, row_height=1.0)
    assert single.shape == (1, 1)


def test_a_single_layer_has_one_tick_and_room_around_it():
    axes = Figure().subplots()
    axes.plot([1], [0.3], "o")
    integer_axis(axes)
    assert axes.get_xlim() == (0.5, 1.5)
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]


def test_curves_of_configurations_are_means_with_a_range_and_count_broken_runs():
    index = pd.MultiIndex.from_product([("a", "b"), (0, 1), range(3)], names=["configuration", "seed", "layer"])
    frame = pd.DataFrame({"value": np.arange(12.0), "other": 1.0}, index=index).reset_index()
    frame.loc[(frame["configuration"] == "b") & (frame["seed"] == 1) & (frame["layer"] == 2), "value"] = np.inf
    axes = Figure().subplots()
    configuration_curves(axes, frame, "value", over="layer")
    lines = {label: line for line in axes.lines if not (label := str(line.get_label())).startswith("_")}
    assert list(lines) == ["a", "b (1 of 2 not finite)"]
    np.testing.assert_array_equal(lines["a"].get_ydata(), [1.5, 2.5, 3.5])
    np.testing.assert_array_equal(lines["b (1 of 2 not finite)"].get_ydata(), [7.5, 8.5, np.nan])
    assert len(axes.collections) == 2
    others = Figure().subplots()
    configuration_curves(others, frame, "other", over="layer", broken=("value",), broken_word="diverged")
    assert others.get_legend_handles_labels()[1] == ["a", "b (1 of 2 diverged)"]


def test_curves_of_layers_are_broken_where_a_seed_is_and_go_from_light_to_dark():
    index = pd.MultiIndex.from_product([(0, 1), range(2), (10, 20)], names=["seed", "layer", "step"])
    frame = pd.DataFrame({"value": np.arange(8.0)}, index=index).reset_index()
    frame.loc[7, "value"] = np.nan
    axes = Figure().subplots()
    layer_curves(axes, frame.sample(frac=1, random_state=0), "value", [0, 1])
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines] == [[10, 20]] * 2
    np.testing.assert_array_equal([line.get_ydata() for line in axes.lines], [[2, 3], [4, np.nan]])
    assert [line.get_color() for line in axes.lines] == [depth_colours(2)(i) for i in range(2)]


def test_lines_that_coincide_take_turns_in_dashes_and_dots():
    steps = np.arange(10.0)
    apart = pd.Series(steps + 1)
    touching = pd.Series(np.where(steps < 3, steps, 9 - steps))
    broken = pd.Series(np.where(steps < 8, steps, np.nan))
    lines = [pd.Series(steps), apart, pd.Series(steps * 1.001), touching, broken, pd.Series(np.full(10, np.nan))]
    styles = turns(lines)
    assert [bool(style) for style in styles] == [True, False, True, False, True, False]
    dashed = [style for style in styles if style]
    assert [style["markevery"] for style in dashed] == [(0, 3), (1, 3), (2, 3)]
    shown = [
        {(length - offset) % 7.5 for length in (0.0, 1.25)} for offset, _ in (each["linestyle"] for each in dashed)
    ]
    assert shown == [{0.0, 1.25}, {2.5, 3.75}, {5.0, 6.25}]  # each draws where the others leave gaps
    assert all(dashes == (2.5, 5.0) for _, dashes in (each["linestyle"] for each in dashed))
    assert turns([]) == []
    assert turns([lines[0], lines[0].iloc[:4]]) == [{}, {}]


@pytest.mark.parametrize("n", [1, 5, 6, 9, 14, 60])
def test_families_keep_the_order_and_are_small(n):
    names = [f"norm {i}" for i in range(n)]
    families = colour_families(names)
    assert [name for family in families for name in family] == names
    assert max(map(len, families)) <= MOST_TOGETHER
    assert max(map(len, families)) - min(map(len, families)) <= 1
    assert all(len(set(family.values())) == len(family) for family in families)


def test_titles_fit_their_panels():
    figure, grid = panel_grid(4, 4, row_height=1.0)
    for axes, name in zip(
        grid[0], ("SM+G", "a model, norm-free, fine-tuned for longer", "x" * 60, "y/" * 40), strict=True
    ):
        title_panel(axes, name, "r = 0.9")
    short, long, unbroken, path = (axes.get_title() for axes in grid[0])
    assert short == "SM+G\nr = 0.9"
    assert long.replace("\n", " ") == "a model, norm-free, fine-tuned for longer r = 0.9"
    assert "norm-free" in long
    assert "\N{HORIZONTAL ELLIPSIS}" in unbroken
    assert path.startswith("y/y/")
    boxes = extents(figure, [axes.title for axes in grid[0]])
    assert on_the_page(figure, boxes)
    assert apart(boxes)


def test_a_lone_panel_is_not_stretched():
    assert panel_grid(1, 4, row_height=1.5)[0].get_figwidth() < 4
    assert panel_grid(4, 4, row_height=1.5)[0].get_figwidth() == TWO_COLUMN


def test_cells_that_are_not_finite_are_hatched_and_empty_texts_left_out():
    values = np.array([[0.0, np.nan], [np.inf, 1.0]])
    axes = Figure().subplots()
    cells: dict[str, Any] = {"rows": ["above", "below"], "columns": range(2)}
    annotated_heatmap(axes, values, Normalize(0, 1), entropy_colours(), text=lambda x: f"{x:g}" if x else "", **cells)
    patches: Any = axes.patches
    assert [(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in patches] == [(1, 0), (0, 1)]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(1, 0): "nan", (0, 1): "inf", (1, 1): "1"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["above", "below"]
