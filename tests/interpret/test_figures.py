import numpy as np
import pandas as pd
import pytest
from scipy import stats

from normfree.errors import InputError
from normfree.interpret.figures import (
    attribution_error_heatmaps,
    confidence_neurons,
    patching_agreement,
    residual_std_by_position,
)

MODELS = ("LN", "norm-free")


def errors(models=MODELS, n_layer=3, n_head=4):
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"model": model, "layer": layer, "head": head, "nmae": draw.uniform(0.02, 0.6)}
            for model in models
            for layer in range(n_layer)
            for head in range(n_head)
        ]
    )


def patches(models=MODELS):
    draw = np.random.default_rng(1)
    activation = draw.normal(size=30 * len(models))
    return pd.DataFrame(
        {
            "model": np.repeat(models, 30),
            "layer": np.tile(range(3), 10 * len(models)),
            "activation_patching": activation,
            "attribution_patching": activation + 0.4 * draw.normal(size=len(activation)),
        }
    )


def weights():
    draw = np.random.default_rng(2)
    neurons = pd.MultiIndex.from_product([MODELS, [5], range(20)], names=["model", "layer", "neuron"])
    columns = {"weight_norm": draw.uniform(1, 3, 40), "logit_variance": draw.lognormal(-9, 1, 40)}
    return pd.DataFrame(columns, index=neurons).reset_index()


def effects():
    draw = np.random.default_rng(3)
    rows = weights().query("neuron < 6")[["model", "layer", "neuron"]].reset_index(drop=True)
    total = draw.exponential(0.01, len(rows))
    return rows.assign(total_effect_nats=total, frozen_effect_nats=total * draw.uniform(0, 1, len(rows)))


def stds():
    index = pd.MultiIndex.from_product([MODELS, range(3), range(8)], names=["model", "layer", "position"])
    return pd.DataFrame({"residual_std": np.linspace(1, 9, len(index))}, index=index).reset_index()


def panels(figure):
    """The axes of the models, without the colour bar's."""
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def test_heatmaps_share_one_scale_from_zero():
    frame = errors()
    found = panels(attribution_error_heatmaps(frame.sample(frac=1, random_state=0).sort_values("model")))
    for axes, model in zip(found, MODELS, strict=True):
        rows = frame[frame["model"] == model]
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), rows.pivot(index="layer", columns="head", values="nmae"))
        assert image.norm is found[0].get_images()[0].norm
        assert (image.norm.vmin, image.norm.vmax) == (0, frame["nmae"].max())
        assert axes.get_title() == f"{model}\nmedian {100 * rows['nmae'].median():.1f} %"


def test_errors_above_one_leave_the_scale_and_those_not_finite_are_hatched():
    frame = errors()
    frame.loc[2, "nmae"] = 40.0
    frame.loc[3, "nmae"] = np.nan
    frame.loc[4, "nmae"] = np.inf
    first, second = panels(figure := attribution_error_heatmaps(frame))
    assert first.get_images()[0].norm.vmax == 1
    assert [patch.get_hatch() for patch in first.patches] == ["////"] * 2
    assert not second.patches
    assert f"median {100 * frame['nmae'][:12].drop([3, 4]).median():.1f} %" in first.get_title()
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "error over direct effect (NMAE)"
    attribution_error_heatmaps(frame.assign(nmae=np.nan)).canvas.draw()
    exact = attribution_error_heatmaps(frame.assign(nmae=1e-9))
    assert panels(exact)[0].get_title() == "LN\nmedian below 0.1 %"


def test_patches_stand_against_the_identity():
    frame = patches()
    for axes, model in zip(panels(patching_agreement(frame)), MODELS, strict=True):
        rows = frame[frame["model"] == model]
        x, y = rows["activation_patching"], rows["attribution_patching"]
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([x, y], axis=1))
        assert axes.get_title() == f"{model}\nr = {stats.pearsonr(x, y).statistic:.3f}"
        (identity,) = axes.lines
        np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xlim()[0] < frame[["activation_patching", "attribution_patching"]].min(axis=None)
        colours = axes.collections[0].get_facecolors()
        assert len(np.unique(colours, axis=0)) == 3


def test_patches_without_a_correlation_say_why():
    frame = patches()
    frame.loc[0, "activation_patching"] = np.nan
    titles = [axes.get_title() for axes in panels(patching_agreement(frame))]
    assert titles[0] == "LN\n1 of 30 not finite"
    assert titles[1].startswith("norm-free\nr = ")
    flat = patching_agreement(frame.assign(activation_patching=0.5))
    assert panels(flat)[0].get_title() == "LN\nno correlation"
    patching_agreement(frame.assign(activation_patching=np.nan, attribution_patching=np.nan)).canvas.draw()


def test_confidence_neurons_show_weights_above_and_effects_below():
    every, ablated = weights(), effects()
    found = panels(confidence_neurons(every, ablated))
    for above, below, model in zip(found[:2], found[2:], MODELS, strict=True):
        grey, marked = (dots.get_offsets() for dots in above.collections)
        rows, chosen = every[every["model"] == model], ablated[ablated["model"] == model]
        np.testing.assert_array_equal(grey, rows[["weight_norm", "logit_variance"]])
        np.testing.assert_array_equal(marked, rows.head(6)[["weight_norm", "logit_variance"]])
        assert above.get_yscale() == "log"
        (dots,) = (dots.get_offsets() for dots in below.collections)
        np.testing.assert_array_equal(dots, chosen[["total_effect_nats", "frozen_effect_nats"]])
        assert below.get_xlim() == below.get_ylim()
        assert below.get_xlim()[1] > ablated["total_effect_nats"].max()
        assert not below.get_title()


def test_effects_that_are_not_finite_are_counted():
    ablated = effects()
    ablated.loc[1, "total_effect_nats"] = np.nan
    found = panels(confidence_neurons(weights(), ablated))
    assert [axes.get_title() for axes in found[2:]] == ["1 of 6 not finite", ""]
    confidence_neurons(weights(), ablated.assign(total_effect_nats=np.nan, frozen_effect_nats=np.nan)).canvas.draw()
    confidence_neurons(weights(), ablated.assign(total_effect_nats=0.0, frozen_effect_nats=0.0)).canvas.draw()


def test_stds_are_lines_by_layer_over_positions_from_one():
    frame = stds()
    frame.loc[3, "residual_std"] = np.inf
    found = panels(figure := residual_std_by_position(frame.sample(frac=1, random_state=0).sort_values("model")))
    for axes, model in zip(found, MODELS, strict=True):
        assert len(axes.lines) == 3
        for layer, line in enumerate(axes.lines):
            rows = frame[(frame["model"] == model) & (frame["layer"] == layer)]
            np.testing.assert_array_equal(line.get_xdata(), range(1, 9))
            expected = rows["residual_std"].replace(np.inf, np.nan)
            np.testing.assert_array_equal(line.get_ydata(), expected)
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_title() == model
    figure.canvas.draw()
    assert "10" in [tick.get_text() for tick in found[0].get_yticklabels()]


@pytest.mark.parametrize("n_model", [1, 2, 3, 4])
def test_any_number_of_models_has_a_panel_each(n_model):
    models = [f"model {i}" for i in range(n_model)]
    for figure in (
        attribution_error_heatmaps(errors(models)),
        patching_agreement(patches(models)),
        residual_std_by_position(pd.concat([stds().query("model == 'LN'").assign(model=model) for model in models])),
    ):
        figure.canvas.draw()
        assert [axes.get_title().split("\n")[0] for axes in panels(figure)] == models


def test_bad_frames():
    with pytest.raises(InputError, match="no row for layer 0, head 1 of 'LN'"):
        attribution_error_heatmaps(errors().drop(index=1))
    with pytest.raises(InputError, match="attribution errors frame lacks nmae"):
        attribution_error_heatmaps(errors().drop(columns="nmae"))
    with pytest.raises(InputError, match="patches frame has no rows"):
        patching_agreement(patches().iloc[:0])
    with pytest.raises(InputError, match="more than one row for model LN, layer 0, position 0"):
        residual_std_by_position(pd.concat([stds(), stds()]))
    with pytest.raises(InputError, match="of other models or neurons"):
        confidence_neurons(weights(), effects().query("model == 'LN'"))
    with pytest.raises(InputError, match="of other models or neurons"):
        confidence_neurons(weights().query("neuron > 2"), effects())
