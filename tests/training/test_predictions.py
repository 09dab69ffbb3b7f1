"""Predictions against NumPy and SciPy in float64, and closed forms."""

from math import log
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from scipy.stats import entropy

from normfree.training import predictions as module
from normfree.training.predictions import Predictions, jensen_shannon, predictions
from tests.interpret.small_decoders import ALL, T, decoder, gpt2, stirred, tokens

SEQUENCES = tokens(5, T)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=SEQUENCES, use_cache=False).logits.double().numpy()[:, :-1]


def moved(model, scale):
    """A copy of ``model`` with other weights."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    return stirred(other, scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_against_scipy(name, dtype, monkeypatch):
    original = ALL[name]().to(dtype)
    model = moved(original, 0.2).to(dtype)
    labels = SEQUENCES.clone()
    labels[0, :3], labels[3, 4] = -100, -100
    monkeypatch.setattr(module, "LOGIT_BYTES", 2 * T * 50 * 4)  # two sequences a pass
    monkeypatch.setattr(module, "BLOCK_BYTES", 5 * 50 * 4)  # five tokens together
    found = predictions([original, model], SEQUENCES, labels)[1]
    one, other = (log_softmax(logits_of(each), axis=-1) for each in (model, original))
    p, q = np.exp(one), np.exp(other)
    is_predicted = labels.numpy()[:, 1:] != -100
    np.testing.assert_array_equal(found.is_predicted, is_predicted)
    targets = SEQUENCES.numpy()[:, 1:]
    expected = {
        "losses": -np.take_along_axis(one, targets[..., None], -1)[..., 0],
        "entropies": entropy(p, axis=-1),
        "confidences": p.max(-1),
        "divergences": jensenshannon(p, q, axis=-1) ** 2,
    }
    tolerance = 1e-10 if dtype == torch.float64 else 3e-5
    for field, values in expected.items():
        got = getattr(found, field)[is_predicted]
        np.testing.assert_allclose(got, values[is_predicted], rtol=tolerance, atol=tolerance / 100, err_msg=field)
    np.testing.assert_array_equal(found.is_correct[is_predicted], (p.argmax(-1) == targets)[is_predicted])
    assert expected["divergences"].mean() > 1e-3
    summary = found.summary()
    assert summary["jsd_nats"] == pytest.approx(expected["divergences"][is_predicted].mean(), rel=tolerance)
    assert summary["loss_nats"] == pytest.approx(expected["losses"][is_predicted].mean(), rel=tolerance)
    positions = found.positions().set_index("position")
    for place in range(1, T):
        seen = is_predicted[:, place - 1]
        assert positions["tokens"][place] == seen.sum()
        mean = expected["losses"][seen, place - 1].mean()
        assert positions["loss_nats"][place] == pytest.approx(mean, rel=tolerance)


def test_a_model_does_not_diverge_from_itself():
    model = gpt2()
    found = predictions([model, model], SEQUENCES)[1]
    assert 0 <= found.summary()["jsd_nats"] < 1e-7
    (alone,) = predictions([model], SEQUENCES)
    assert alone.divergences is None
    assert alone.summary()["jsd_nats"] == 0
    assert found.loss_increase(alone) == (0, 0)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([1, 0], [0, 1], log(2)),
        ([1, 0], [0.5, 0.5], (log(4 / 3) + (log(2 / 3) + log(2)) / 2) / 2),
        ([0.25, 0.75], [0.25, 0.75], 0),
        ([1, 0, 0], [1, 0, 0], 0),
    ],
)
def test_closed_forms_of_the_divergence(p, q, expected):
    one, other = (torch.tensor(each, dtype=torch.float64).log() for each in (p, q))
    assert jensen_shannon(one, other).item() == pytest.approx(expected, abs=1e-15)
    assert jensen_shannon(other, one).item() == pytest.approx(expected, abs=1e-15)


def made(confidences, is_correct, losses=None):
    shape = np.shape(confidences)
    losses = np.zeros(shape) if losses is None else np.asarray(losses, dtype=np.float64)
    every, correct = np.ones(shape, np.bool_), np.asarray(is_correct, np.bool_)
    return Predictions(every, losses, np.zeros(shape), np.asarray(confidences, np.float64), correct, None)


def test_calibration_by_hand():
    found = made([[0.05, 0.31, 0.34, 0.95, 1.0, 0.9]], [[0, 1, 0, 1, 1, 0]])
    bins = found.calibration()
    assert bins["tokens"].tolist() == [1, 0, 0, 2, 0, 0, 0, 0, 0, 3]
    assert bins.loc[3, ["confidence", "accuracy"]].tolist() == pytest.approx([0.325, 0.5])
    assert bins.loc[9, ["confidence", "accuracy"]].tolist() == pytest.approx([2.85 / 3, 2 / 3])
    assert bins.loc[1, ["confidence", "accuracy"]].isna().all()
    expected = (1 * 0.05 + 2 * 0.175 + 3 * abs(2.85 / 3 - 2 / 3)) / 6
    assert found.summary()["ece"] == pytest.approx(expected)
    assert found.summary()["accuracy"] == pytest.approx(0.5)


def test_calibration_against_pandas():
    generator = np.random.default_rng(0)
    confidences, is_correct = generator.random((40, 30)), generator.random((40, 30)) < 0.4
    frame = pd.DataFrame({"confidence": confidences.ravel(), "correct": is_correct.ravel()})
    bins: Any = np.linspace(0, 1, 11)
    groups = frame.groupby(pd.cut(frame["confidence"], bins, right=False), observed=False)
    gaps = (groups["confidence"].mean() - groups["correct"].mean()).abs()
    expected = (groups.size() / len(frame) * gaps).sum()
    assert made(confidences, is_correct).summary()["ece"] == pytest.approx(expected, rel=1e-12)


def test_a_calibrated_model_has_no_error():
    correct = np.arange(100) < 70
    assert made(np.full((1, 100), 0.7), correct[None]).summary()["ece"] == pytest.approx(0, abs=1e-12)


def test_standard_error_over_sequences():
    losses = np.random.default_rng(1).random((9, 6))
    found = made(np.full((9, 6), 0.5), np.zeros((9, 6)), losses)
    expected = losses.mean(axis=1).std(ddof=1) / 3
    assert found.summary()["standard_error"] == pytest.approx(expected)
    other = made(np.full((9, 6), 0.5), np.zeros((9, 6)), losses - np.arange(9)[:, None])
    assert found.loss_increase(other) == pytest.approx((4, np.arange(9).std(ddof=1) / 3))
    assert np.isnan(made([[0.5]], [[1]]).summary()["standard_error"])


def test_impossible_tokens_count_for_nothing_and_nan_stays():
    model, original = decoder(lm_head_bias=True), decoder(lm_head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[9] = -torch.inf
    sequences = SEQUENCES.masked_fill(SEQUENCES == 9, 8)
    found = predictions([original, model], sequences)[1]
    assert all(np.isfinite(values) for values in found.summary().values())
    with torch.no_grad():
        model.lm_head.bias[9] = torch.nan
    found = predictions([original, model], sequences)[1]
    assert all(np.isnan(found.summary()[name]) for name in ("loss_nats", "entropy_nats", "accuracy", "ece", "jsd_nats"))
    assert found.positions()["loss_nats"].isna().all()
    assert found.calibration()["tokens"].sum() == 0
