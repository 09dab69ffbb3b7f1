import re
import zlib
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from normfree.errors import InputError
from normfree.report import published_head_entropy, save_figure
from normfree.report.entropy_figures import headwise_entropy_distribution, layerwise_entropy_dynamics
from normfree.report.loss_curves import evaluation_loss_curves
from normfree.report.style import configuration_colours, depth_colours

from . import study


def _bars(axes):
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}


def _labelled_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def _crosses(axes):
    return [line for line in axes.lines if line.get_marker() == "X"]


def test_published_distribution_is_figure_2a():
    figure = headwise_entropy_distribution(published_head_entropy())
    (axes,) = figure.axes
    bars = _bars(axes)
    assert bars["SM+G"][3] == pytest.approx(100 * 83 / 144)
    assert bars["SM+R"][3] == pytest.approx(100 * 32 / 144)
    assert all(sum(heights) == pytest.approx(100) for heights in bars.values())
    assert "58" in [text.get_text() for text in axes.texts]
    labels = ["[0, max/4)", "[max/4, max/2)", "[max/2, 3max/4)", "[3max/4, max]"]
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert axes.get_ylabel() == "share of heads (%)"


def test_distribution_over_seeds_has_whiskers_and_dots():
    frame = study.head_entropy(n_layer=1, n_head=4, seeds=(0, 1, 2))
    frame["entropy_nats"] = 4.0
    frame.loc[(frame["configuration"] == "SM+G") & (frame["seed"] == 0) & (frame["head"] < 2), "entropy_nats"] = 0.5
    (axes,) = headwise_entropy_distribution(frame).axes
    # Shares of SM+G in the first band are 50, 0 and 0 %: mean 16.67, t(0.975, 2) = 4.302653, s = 28.8675.
    assert _bars(axes)["SM+G"] == pytest.approx([100 / 6, 0, 0, 500 / 6])
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert len(dots) == 16
    assert any(sorted(np.asarray(line.get_ydata())) == [0.0, 0.0, 50.0] for line in dots)
    whiskers = [tuple(np.asarray(line.get_ydata())) for line in axes.lines if line.get_marker() == "None"]
    high = 100 / 6 + 4.302652729911275 * 28.867513459481287 / np.sqrt(3)
    assert any(whisker == pytest.approx((0.0, high)) for whisker in whiskers)


def test_distribution_writes_nan_for_a_diverged_configuration():
    (axes,) = headwise_entropy_distribution(study.head_entropy(seeds=(0, 1), nan_run=("SM+G", 1))).axes
    assert np.isnan(_bars(axes)["SM+G"]).all()
    assert [text.get_text() for text in axes.texts].count("NaN") == 4


def test_loss_curves_are_means_with_a_band():
    frame = study.eval_curve(seeds=(0, 1, 2))
    (axes,) = evaluation_loss_curves(frame.sample(frac=1, random_state=3)).axes
    lines = _labelled_lines(axes)
    assert list(lines) == list(frame.sample(frac=1, random_state=3)["configuration"].unique())
    middle = frame[(frame["configuration"] == "SM+R") & (frame["seed"] == 1)]
    np.testing.assert_array_equal(lines["SM+R"].get_xdata(), middle["tokens"])
    np.testing.assert_allclose(lines["SM+R"].get_ydata(), middle["eval_loss"], rtol=1e-12)
    assert len(axes.collections) == 4
    assert axes.get_ylabel() == "evaluation loss (nats per token)"
    assert not _crosses(axes)
    assert to_hex(lines["SM+G"].get_color()) == "#d55e00"


def test_the_first_evaluation_does_not_flatten_the_rest():
    frame = study.eval_curve()
    (axes,) = evaluation_loss_curves(frame).axes
    bottom, top = axes.get_ylim()
    later = frame[frame["step"] >= 120]["eval_loss"]
    assert bottom < frame["eval_loss"].min()
    assert later.max() < top < 9.0


def test_a_diverged_run_ends_in_a_cross_and_does_not_stretch_the_axis():
    frame = study.eval_curve(seeds=(0, 1, 2), diverges=("SM+G", 2))
    (axes,) = evaluation_loss_curves(frame).axes
    (cross,) = _crosses(axes)
    top = axes.get_ylim()[1]
    assert top < 9.0
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (400 * 4096, pytest.approx(top))
    mean = _labelled_lines(axes)["SM+G (1 of 3 diverged)"]
    assert np.isnan(mean.get_ydata()[5:]).all()
    assert np.isfinite(mean.get_ydata()[:5]).all()


def test_all_runs_diverged_at_once():
    frame = study.eval_curve().assign(eval_loss=float("nan"))
    (axes,) = evaluation_loss_curves(frame).axes
    assert all(label.endswith("(diverged)") for label in _labelled_lines(axes))


def test_dynamics_has_a_panel_a_configuration_and_a_line_a_layer():
    frame = study.layer_entropy(seeds=(0, 1, 2))
    figure = layerwise_entropy_dynamics(frame, bound=3.878)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == list(study.CONFIGURATIONS)
    assert len({axes.get_ylim() for axes in panels}) == 1
    for axes in panels:
        layers = [line for line in axes.lines if line.get_linestyle() == "-"]
        (bound,) = (line for line in axes.lines if line.get_linestyle() != "-")
        assert len(layers) == 6
        assert list(np.asarray(bound.get_ydata())) == [3.878, 3.878]
        middle = frame[(frame["configuration"] == axes.get_title()) & (frame["seed"] == 1) & (frame["layer"] == 4)]
        np.testing.assert_allclose(np.asarray(layers[4].get_ydata()), middle["entropy_nats"], rtol=1e-12)
        assert to_hex(layers[4].get_color()) == to_hex(depth_colours(6)(4))
    assert figure.axes[-1].get_ylabel() == "layer"
    assert figure.get_supylabel() == "attention entropy (nats)"
    assert "mean over 3 seeds" in figure.get_supxlabel()


def test_dynamics_hatches_from_where_nan_begins():
    figure = layerwise_entropy_dynamics(study.layer_entropy(seeds=(0, 1), diverges=("SM+G", 1)))
    panels = {axes.get_title(): axes for axes in figure.axes}
    span: Any
    (span,) = panels["SM+G"].patches
    assert span.get_hatch() == "////"
    assert span.get_x() == 100
    assert "NaN in 1 of 2 runs\nfrom step 100" in [text.get_text() for text in panels["SM+G"].texts]
    assert np.isnan(np.asarray(panels["SM+G"].lines[0].get_ydata())[10:]).all()
    assert not panels["SM+R"].patches


@pytest.mark.parametrize(
    ("draw", "frame"),
    [
        (headwise_entropy_distribution, study.head_entropy()),
        (evaluation_loss_curves, study.eval_curve()),
        (layerwise_entropy_dynamics, study.layer_entropy()),
    ],
)
def test_bad_frames(draw, frame):
    with pytest.raises(InputError, match=r"mixes several models or context lengths \(tiny, T = 128; tiny, T = 256\)"):
        draw(pd.concat([frame, frame.assign(context_length=256)]))
    with pytest.raises(InputError, match="lacks seed"):
        draw(frame.drop(columns="seed"))
    with pytest.raises(InputError, match="more than one row"):
        draw(pd.concat([frame, frame]))


def test_colours_are_fixed_and_distinct():
    assert configuration_colours(["SM+R", "SM+G"])["SM+G"] == configuration_colours(["SM+G"])["SM+G"]
    names = [*study.CONFIGURATIONS, *"abcdefghij"]
    assert len(set(configuration_colours(names).values())) == 14
    assert len({to_hex(depth_colours(24)(i)) for i in range(24)}) == 24


def test_saved_files(tmp_path):
    figure = evaluation_loss_curves(study.eval_curve())
    paths = save_figure(figure, tmp_path / "figures", "loss")
    assert [path.name for path in paths] == ["loss.png", "loss.pdf"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["loss.pdf", "loss.png"]
    with Image.open(paths[0]) as image:
        assert image.size == (660, 450)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    pdf = paths[1].read_bytes()
    assert b"/FontFile2" in pdf  # a TrueType font program is embedded
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    text = b"".join(zlib.decompress(stream) for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.S))
    assert b"Tj" in text or b"TJ" in text  # labels are text, not outlines


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first, second = (
        [path.read_bytes() for path in save_figure(evaluation_loss_curves(study.eval_curve()), tmp_path / name, "loss")]
        for name in ("a", "b")
    )
    assert first == second


def test_both_files_have_one_layout_and_the_figure_keeps_its_engine(tmp_path):
    class Counting(ConstrainedLayoutEngine):
        n_run = 0

        def execute(self, fig):
            Counting.n_run += 1
            super().execute(fig)

    figure = Figure((2, 2), layout=Counting())
    (above, below) = figure.subplots(2)
    figure.colorbar(above.imshow([[0.0, 1.0]]), ax=below)
    save_figure(figure, tmp_path, "once")
    assert Counting.n_run == 1
    assert isinstance(figure.get_layout_engine(), Counting)
    assert figure.dpi == 100


@pytest.mark.parametrize("name", ["../loss", "a/b", "", ".hidden", "loss\n"])
def test_bad_figure_names(tmp_path, name):
    with pytest.raises(InputError, match="not a plain file name"):
        save_figure(evaluation_loss_curves(study.eval_curve()), tmp_path, name)


def test_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "loss.png").write_text("old")

    class Unwritable(Figure):
        def savefig(self, *path, **options):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        save_figure(Unwritable(), tmp_path, "loss")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").read_text() == "old"


def test_drawing_leaves_the_backend_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save_figure(layerwise_entropy_dynamics(study.layer_entropy()), tmp_path, "dynamics")
    save_figure(headwise_entropy_distribution(study.head_entropy()), tmp_path, "bands")
    assert dict(matplotlib.rcParams) == before
