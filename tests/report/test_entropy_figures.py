import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from normfree.errors import InputError
from normfree.report import published_head_entropy
from normfree.report.entropy_figures import headwise_entropy_heatmaps

from . import study


def _panels(figure):
    return [axes for axes in figure.axes if axes.get_images()]


def _grid(frame, configuration):
    return (
        frame[frame["configuration"] == configuration]
        .pivot(index="layer", columns="head", values="entropy_nats")
        .to_numpy()
    )


@pytest.mark.parametrize(("n_layer", "n_head"), [(6, 4), (12, 12), (24, 16), (1, 1), (2, 40)])
def test_panels_show_the_entropies_on_one_scale(n_layer, n_head):
    frame = study.head_entropy(n_layer, n_head).sample(frac=1, random_state=1)
    figure = headwise_entropy_heatmaps(frame)
    panels = _panels(figure)
    assert {axes.get_title() for axes in panels} == set(study.CONFIGURATIONS)
    for axes in panels:
        (image,) = axes.get_images()
        np.testing.assert_array_equal(np.asarray(image.get_array()), _grid(frame, axes.get_title()))
        assert image.norm is panels[0].get_images()[0].norm
        assert (image.norm.vmin, image.norm.vmax) == (0.0, frame["entropy_nats"].max())
        assert image.cmap.name == "viridis"
        assert axes.get_xlabel() == "head"
        # Layer 0 is at the top.
        assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert panels[0].get_ylabel() == "layer"


def test_cells_are_annotated_with_readable_values():
    frame = published_head_entropy()
    for axes in _panels(headwise_entropy_heatmaps(frame)):
        grid = _grid(frame, axes.get_title())
        assert len(axes.texts) == 144
        (image,) = axes.get_images()
        for text in axes.texts:
            head, layer = text.get_position()
            assert text.get_text() == f"{grid[layer, head]:.2f}"
            assert _contrast(image.cmap(image.norm(grid[layer, head])), text.get_color()) >= 4.5


def _contrast(background, text):
    """WCAG 2 contrast ratio."""

    def luminance(colour):
        c = np.asarray(to_rgb(colour))
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(background), luminance(text)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_annotations_fit_their_cells_or_are_left_out():
    small = headwise_entropy_heatmaps(study.head_entropy(24, 16))
    assert all(not axes.texts for axes in _panels(small))
    forced = headwise_entropy_heatmaps(study.head_entropy(24, 16), annotate=True)
    assert all(len(axes.texts) == 24 * 16 for axes in _panels(forced))
    assert all(not axes.texts for axes in _panels(headwise_entropy_heatmaps(study.head_entropy(), annotate=False)))
    for shape in ((6, 4), (12, 12), (12, 8)):
        figure = headwise_entropy_heatmaps(study.head_entropy(*shape))
        renderer = FigureCanvasAgg(figure).get_renderer()
        for axes in _panels(figure):
            cell = axes.get_window_extent(renderer)
            for text in axes.texts:
                extent = text.get_window_extent(renderer)
                assert extent.width < cell.width / shape[1]
                assert extent.height < cell.height / shape[0]


def test_several_seeds_show_their_mean_and_say_so():
    frame = study.head_entropy(seeds=(0, 1, 2))
    figure = headwise_entropy_heatmaps(frame)
    (image,) = _panels(figure)[2].get_images()
    mean = np.mean([_grid(run, "SM+G") for _, run in frame.groupby("seed")], axis=0)
    np.testing.assert_allclose(np.asarray(image.get_array()), mean, rtol=1e-14)
    assert "Mean over 3 seeds." in [text.get_text() for text in figure.texts]
    assert not headwise_entropy_heatmaps(study.head_entropy()).texts


def test_nan_is_hatched_written_and_named():
    figure = headwise_entropy_heatmaps(study.head_entropy(seeds=(0, 1, 2), nan_run=("SM+G", 2)))
    panels = {axes.get_title(): axes for axes in _panels(figure)}
    broken = panels["SM+G"]
    assert np.ma.getmaskarray(broken.get_images()[0].get_array()).all()
    assert [patch.get_hatch() for patch in broken.patches] == ["////"] * 24
    assert {text.get_text() for text in broken.texts} == {"NaN"}
    assert not panels["SM+R"].patches
    assert any("SM+G (1 of 3)" in text.get_text() for text in figure.texts)


def test_all_nan_and_too_small_to_annotate_still_says_nan():
    frame = study.head_entropy(24, 16, nan_run=("SM+G", 0))
    panels = {axes.get_title(): axes for axes in _panels(headwise_entropy_heatmaps(frame))}
    assert [text.get_text() for text in panels["SM+G"].texts] == ["NaN"]


def test_uniform_bound_is_marked_and_in_the_scale():
    figure = headwise_entropy_heatmaps(study.head_entropy(), maximum=3.878)
    assert _panels(figure)[0].get_images()[0].norm.vmax == 3.878
    (bar,) = (axes for axes in figure.axes if axes.get_ylabel() == "attention entropy (nats)")
    assert any(list(np.asarray(line.get_ydata())) == [3.878, 3.878] for line in bar.lines)
    assert [text.get_text() for text in bar.texts] == ["uniform 3.88"]
    low = headwise_entropy_heatmaps(study.head_entropy(), maximum=1.0)
    assert _panels(low)[0].get_images()[0].norm.vmax > 1.0


def test_published_values_beside_ours():
    ours, published = study.head_entropy(), published_head_entropy()
    panels = _panels(headwise_entropy_heatmaps(pd.concat([ours, published])))
    assert [axes.get_images()[0].get_array().shape for axes in panels] == [(6, 4)] * 4 + [(12, 12)] * 4
    assert len({id(axes.get_images()[0].norm) for axes in panels}) == 1
    labels = [axes.get_ylabel() for axes in panels if axes.get_ylabel()]
    assert labels[0] == "tiny, T = 128\nlayer"
    assert labels[-1] == "GPT-2, T = 128\nlayer"
    np.testing.assert_array_equal(panels[6].get_images()[0].get_array(), _grid(published, "SM+G"))


def test_panels_do_not_overlap_and_stay_on_the_page():
    figure = headwise_entropy_heatmaps(pd.concat([study.head_entropy(), published_head_entropy()]), maximum=3.878)
    boxes = [axes.get_position() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= 1
        assert box.y1 <= 1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_global_settings_are_untouched():
    before = dict(matplotlib.rcParams)
    headwise_entropy_heatmaps(study.head_entropy())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.iloc[1:], r"no row for layer 0, head 0 of 'SM\+LN\+G' \(seed 0\)"),
        (lambda f: pd.concat([f, f]), "more than one row"),
        (lambda f: f.drop(columns="head"), "lacks head"),
        (lambda f: f.iloc[:0], "has no rows"),
    ],
)
def test_bad_frames(change, message):
    with pytest.raises(InputError, match=message):
        headwise_entropy_heatmaps(change(study.head_entropy()))


def test_bad_annotate():
    with pytest.raises(InputError, match="unknown value of annotate 'yes'"):
        headwise_entropy_heatmaps(study.head_entropy(), annotate="yes")  # type: ignore[arg-type]
