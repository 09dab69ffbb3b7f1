"""Comparisons of models as frames and files, and their figures."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.report.prediction_figures import loss_by_position, reliability_diagrams
from normfree.training.prediction_comparison import PredictionComparison, Text, compare_on
from normfree.training.predictions import predictions
from tests.interpret.small_decoders import T, decoder, tokens


@pytest.fixture(scope="module")
def models():
    return {"original": decoder(), "norm-free": decoder()}


@pytest.fixture(scope="module")
def texts():
    return {"one": Text.of(tokens(4, T), 0), "two": Text.of(tokens(6, T, seed=1), 3)}


def itself(model):
    return model


@pytest.fixture(scope="module")
def compared(models, texts):
    return compare_on(texts, {name: partial(itself, model) for name, model in models.items()})


def test_frames_hold_every_model_and_corpus(compared, models, texts):
    rows = compared.evaluation.set_index(["corpus", "model"])
    assert rows.index.tolist() == [(corpus, model) for corpus in texts for model in models]
    assert rows["sequences"].tolist() == [4, 4, 6, 6]
    assert rows["tokens"].tolist() == [4 * (T - 1)] * 2 + [6 * (T - 3)] * 2
    for corpus, (sequences, labels) in texts.items():
        found = predictions([models["original"], models["norm-free"]], sequences, labels)[1]
        for name, value in found.summary().items():
            assert rows.loc[(corpus, "norm-free"), name] == pytest.approx(value, rel=1e-6)
        original = rows.loc[(corpus, "original")]
        increase = rows.loc[(corpus, "norm-free"), "loss_nats"] - original["loss_nats"]
        assert rows.loc[(corpus, "norm-free"), "delta_loss_nats"] == pytest.approx(increase)
        assert original[["delta_loss_nats", "delta_standard_error", "jsd_nats"]].tolist() == [0, 0, 0]
    assert compared.positions.groupby(["corpus", "model"])["position"].min().tolist() == [1, 1, 3, 3]
    assert compared.calibration.groupby(["corpus", "model"])["tokens"].sum().tolist() == [24, 24, 24, 24]


def test_written_and_read_again(compared, tmp_path):
    assert PredictionComparison.read(tmp_path) is None
    compared.write(tmp_path)
    read = PredictionComparison.read(tmp_path)
    assert read is not None
    for name in ("evaluation", "calibration", "positions"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(compared, name), check_dtype=False)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"calibration", "loss-by-position"}
    both = read.without(["one"]).together(read.without(["two"]))
    assert both.evaluation["corpus"].tolist() == ["two", "two", "one", "one"]


def test_models_of_other_vocabularies_are_refused(models, texts):
    other = decoder(vocab_size=60)
    with pytest.raises(InputError, match="original and other have vocabularies of 50 and 60 tokens"):
        compare_on(texts, {"original": lambda: models["original"], "other": lambda: other})


def test_figures_show_the_frames(compared):
    figure = reliability_diagrams(compared.calibration, compared.evaluation)
    axes = figure.axes[1]
    bins = compared.calibration.query("corpus == 'two' and model == 'norm-free' and tokens > 0")
    (line,) = (line for line in axes.lines if line.get_label() == "norm-free")
    np.testing.assert_allclose(np.asarray(line.get_xydata()), bins[["confidence", "accuracy"]])
    ece = compared.evaluation.query("corpus == 'two' and model == 'norm-free'")["ece"].item()
    assert f"ECE {ece:.3f}" in [text.get_text() for text in axes.texts]

    figure = loss_by_position(compared.positions)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "original")
    rows = compared.positions.query("corpus == 'one' and model == 'original'").set_index("position")["loss_nats"]
    np.testing.assert_allclose(np.asarray(line.get_xdata()), [1, 2.5, 5])
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [rows[1], rows[[2, 3]].mean(), rows[[4, 5, 6]].mean()])


def test_losses_that_are_nan_are_drawn_as_gaps(compared):
    broken = compared.positions.assign(loss_nats=np.nan)
    figure = loss_by_position(broken)
    figure.draw_without_rendering()
    assert all(np.isnan(line.get_ydata()).all() for line in figure.axes[0].lines)
    calibration = compared.calibration.assign(tokens=0.0, confidence=np.nan, accuracy=np.nan)
    reliability_diagrams(calibration, compared.evaluation.assign(ece=np.nan)).draw_without_rendering()


@pytest.mark.parametrize("column", ["corpus", "accuracy"])
def test_missing_columns(compared, column):
    with pytest.raises(InputError, match=f"the calibration frame lacks {column}"):
        reliability_diagrams(compared.calibration.drop(columns=column), compared.evaluation)
