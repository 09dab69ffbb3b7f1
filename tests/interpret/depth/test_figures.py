from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import AxesImage

from normfree.errors import InputError
from normfree.interpret.depth.figures import (
    angular_distance_heatmaps,
    jacobian_distance_and_gradient_norms,
    residual_variance_over_depth,
    skipped_layer_losses,
)
from tests.legends import legend_texts

CONFIGURATIONS = ("pre", "scaled")
N_LAYER = 6


def frame(columns, numbers, over="layer", seeds=(0,), configurations=CONFIGURATIONS, **more):
    draw = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([configurations, seeds, numbers], names=["configuration", "seed", over])
    values = {column: draw.lognormal(0, 1, len(index)) for column in columns}
    return pd.DataFrame(values, index=index).reset_index().assign(**more)


def variance(**options):
    columns = ("residual_variance", "standard_error", "fitted_variance")
    sets = [frame(columns, range(N_LAYER + 1), tokens=tokens, **options) for tokens in ("all", "without first")]
    rows = pd.concat(sets, ignore_index=True)
    rows.loc[rows["layer"] == 0, "fitted_variance"] = np.nan
    return rows


def growth(laws):
    """``laws`` [configuration, seed] of the best fits."""
    rows = [
        {"configuration": configuration, "seed": seed, "tokens": tokens, "law": law, "is_best": law == best}
        for (configuration, seed), best in laws.items()
        for tokens in ("all", "without first")
        for law in ("linear", "exponential")
    ]
    return pd.DataFrame(rows)


def losses(over, numbers, **options):
    return frame(("loss_increase_nats", "standard_error"), numbers, over=over, **options)


def distances(**options):
    pairs = [(layer, n) for n in range(1, N_LAYER + 1) for layer in range(N_LAYER - n + 1)]
    draw = np.random.default_rng(1)
    return pd.concat(
        [
            rows.assign(n_apart=rows["pair"].map(lambda i: pairs[i][1]), layer=rows["pair"].map(lambda i: pairs[i][0]))
            for rows in [frame((), range(len(pairs)), over="pair", **options)]
        ]
    ).assign(angular_distance=lambda rows: draw.uniform(0, 0.5, len(rows)))


def dotted(axes):
    return {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}


def whiskers(axes):
    return [container for container in axes.containers if container.has_yerr]


def cells_of(image: AxesImage) -> np.ndarray:
    cells = image.get_array()
    assert cells is not None
    return cells


def test_variance_is_logarithmic_with_its_law_dashed_and_named():
    frame_, laws = variance(), growth({("pre", 0): "exponential", ("scaled", 0): "linear"})
    figure = residual_variance_over_depth(frame_.sample(frac=1, random_state=0).sort_values("configuration"), laws)
    for axes, tokens in zip(figure.axes, ("all", "without first"), strict=True):
        for configuration, line in dotted(axes).items():
            rows = frame_[(frame_["configuration"] == configuration) & (frame_["tokens"] == tokens)]
            np.testing.assert_array_equal(line.get_xdata(), range(N_LAYER + 1))
            np.testing.assert_array_equal(line.get_ydata(), rows["residual_variance"])
            (fit,) = (each for each in axes.lines if each.is_dashed() and each.get_color() == line.get_color())
            np.testing.assert_array_equal(fit.get_ydata(), rows["fitted_variance"])
        assert legend_texts(axes) == ["exponential", "linear"]
        assert axes.get_yscale() == "log"
        assert len(whiskers(axes)) == 2


def test_laws_of_several_seeds_are_counted():
    laws = growth({("pre", 0): "linear", ("pre", 1): "exponential", ("pre", 2): "linear"})
    laws.loc[laws["tokens"] == "all", "is_best"] = False
    figure = residual_variance_over_depth(variance(seeds=(0, 1, 2), configurations=("pre",)), laws)
    texts = [legend_texts(axes)[0] for axes in figure.axes]
    assert texts == ["undecided", "linear (2), exponential (1)"]


def test_several_seeds_are_a_mean_and_a_band_and_one_has_whiskers():
    skipped = losses("layer", range(N_LAYER), seeds=(0, 1, 2))
    skipped.loc[(skipped["seed"] == 1) & (skipped["configuration"] == "pre"), "loss_increase_nats"] = np.nan
    left, right = skipped_layer_losses(skipped, losses("n_dropped", range(1, N_LAYER))).axes
    lines = dotted(left)
    assert set(lines) == {"pre (1 of 3 not finite)", "scaled"}
    mean = skipped[skipped["configuration"] == "scaled"].groupby("layer")["loss_increase_nats"].mean()
    np.testing.assert_allclose(lines["scaled"].get_ydata(), mean)
    assert np.isnan(lines["pre (1 of 3 not finite)"].get_ydata()).all()
    assert len(left.collections) == 2
    assert not whiskers(left)
    assert left.get_xlabel() == "layer (mean of 3 seeds, band: their range)"

    dropped = losses("n_dropped", range(1, N_LAYER))
    for container, configuration in zip(whiskers(right), CONFIGURATIONS, strict=True):
        rows = dropped[dropped["configuration"] == configuration]
        (segments,) = container.lines[2]
        ends = np.array(segments.get_segments())[:, :, 1]
        np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, 1.96 * rows["standard_error"])


def test_losses_that_fall_have_a_place_and_all_is_inside_the_axes():
    skipped = losses("layer", range(N_LAYER))
    skipped.loc[2, "loss_increase_nats"] = -0.3
    dropped = losses("n_dropped", range(1, N_LAYER)).assign(loss_increase_nats=40.0)
    left, right = skipped_layer_losses(skipped, dropped).axes
    assert left.get_yscale() == right.get_yscale() == "symlog"
    low, high = left.get_ylim()
    assert low < -0.3
    assert high > 40
    assert right.get_ylim() == (low, high)
    rising = skipped_layer_losses(losses("layer", range(N_LAYER)), dropped)
    assert rising.axes[0].get_ylim()[0] == 0


def test_heatmaps_share_one_scale_and_ring_the_smallest_distance():
    frame_ = distances()
    frame_.loc[(frame_["configuration"] == "scaled") & (frame_["n_apart"] == 2), "angular_distance"] = np.nan
    figure = angular_distance_heatmaps(frame_.sample(frac=1, random_state=0).sort_values("configuration"))
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    largest = frame_["angular_distance"].max()
    for axes, configuration in zip(panels, CONFIGURATIONS, strict=True):
        rows = frame_[frame_["configuration"] == configuration]
        (image,) = axes.get_images()
        assert (image.norm.vmin, image.norm.vmax) == (0, largest)
        cells = cells_of(image)
        for row in rows.to_dict("records"):
            cell = cells[row["n_apart"] - 1, row["layer"]]
            assert cell is np.ma.masked if np.isnan(row["angular_distance"]) else cell == row["angular_distance"]
        rings = {int(np.asarray(line.get_ydata())[0]): int(np.asarray(line.get_xdata())[0]) for line in axes.lines}
        finite = rows.dropna().query("n_apart < @N_LAYER").sort_values("angular_distance").drop_duplicates("n_apart")
        assert rings == dict(zip(finite["n_apart"], finite["layer"], strict=True))
        assert axes.get_title() == configuration
    assert [len(axes.patches) for axes in panels] == [0, N_LAYER - 1]


def test_heatmaps_of_several_seeds_are_means_and_models_may_differ_in_depth():
    frame_ = distances(seeds=(0, 1), configurations=("deep",))
    shallow = distances(configurations=("shallow",)).query("layer + n_apart <= 3")
    figure = angular_distance_heatmaps(pd.concat([frame_, shallow]))
    deep, other = (cells_of(axes.get_images()[0]) for axes in figure.axes if axes.get_label() != "<colorbar>")
    mean = frame_.groupby(["n_apart", "layer"])["angular_distance"].mean()
    np.testing.assert_allclose(deep[2, 1], mean.loc[3, 1])
    assert (deep.shape, other.shape) == ((6, 6), (3, 3))


def test_jacobians_and_gradients_are_lines_by_layer():
    jacobian = frame(("jacobian_distance", "standard_error"), range(N_LAYER))
    columns = ("parameter_gradient_norm", "residual_gradient_norm", "standard_error")
    gradients = frame(columns, range(N_LAYER))
    figure = jacobian_distance_and_gradient_norms(jacobian, gradients)
    for axes, rows, column in zip(
        figure.axes, (jacobian, gradients, gradients), ("jacobian_distance", *columns[:2]), strict=True
    ):
        for configuration, line in dotted(axes).items():
            np.testing.assert_array_equal(line.get_ydata(), rows.loc[rows["configuration"] == configuration, column])
        assert axes.get_yscale() == "log"
    assert [len(whiskers(axes)) for axes in figure.axes] == [2, 0, 2]


def test_a_model_that_does_not_learn_does_not_press_the_others_together():
    columns = ("parameter_gradient_norm", "residual_gradient_norm", "standard_error")
    gradients = frame(columns, range(N_LAYER))
    gradients.loc[gradients["configuration"] == "scaled", list(columns)] *= 1e-12
    jacobian = frame(("jacobian_distance", "standard_error"), range(N_LAYER))
    _, parameters, stream = jacobian_distance_and_gradient_norms(jacobian, gradients).axes
    for axes, column in ((parameters, columns[0]), (stream, columns[1])):
        bottom, top = axes.get_ylim()
        np.testing.assert_allclose(bottom, 1e-4 * gradients[column].max())
        assert top > gradients[column].max()


def test_runs_without_a_finite_value_are_drawn():
    laws = growth({("pre", 0): "linear", ("scaled", 0): "linear"}).assign(is_best=False)
    columns = ("parameter_gradient_norm", "residual_gradient_norm", "standard_error")
    nan: dict[str, Any] = {"residual_variance": np.nan, "fitted_variance": np.nan, "standard_error": np.nan}
    figures = [
        residual_variance_over_depth(variance().assign(**nan), laws),
        angular_distance_heatmaps(distances().assign(angular_distance=np.nan)),
        skipped_layer_losses(
            losses("layer", range(1)).assign(loss_increase_nats=np.nan), losses("n_dropped", range(0))
        ),
        jacobian_distance_and_gradient_norms(
            frame(("jacobian_distance", "standard_error"), range(N_LAYER)).assign(jacobian_distance=np.nan),
            frame(columns, range(N_LAYER)).assign(parameter_gradient_norm=np.nan, residual_gradient_norm=np.nan),
        ),
    ]
    for figure in figures:
        figure.canvas.draw()


def test_bad_frames():
    with pytest.raises(InputError, match="residual variance frame lacks residual_variance"):
        residual_variance_over_depth(variance().drop(columns="residual_variance"), growth({("pre", 0): "linear"}))
    with pytest.raises(InputError, match="no row for layer 1, n_apart 3 of 'pre'"):
        angular_distance_heatmaps(distances().query("layer != 1 or n_apart != 3"))
    with pytest.raises(InputError, match="more than one row for configuration pre, seed 0, layer 0"):
        skipped_layer_losses(pd.concat([losses("layer", range(2))] * 2), losses("n_dropped", range(1, 2)))
