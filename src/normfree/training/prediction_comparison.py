"""Several models' predictions on several texts, as frames, CSV files and figures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from normfree.errors import InputError
from normfree.files import exists, write_text
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED
from normfree.progress import stage
from normfree.report import FIGURES_FOLDER, save_figure
from normfree.report.prediction_figures import loss_by_position, reliability_diagrams
from normfree.training.predictions import Predictions, predictions

Loader = Callable[[], PreTrainedModel]
"""Loads a model in evaluation mode."""


class Text(NamedTuple):
    """Sequences, int64 [n, T], and their labels, -100 where a token is not predicted."""

    tokens: Tensor
    labels: Tensor

    @classmethod
    def of(cls, tokens: Tensor, n_beginning: int) -> Text:
        """All but the first ``n_beginning`` tokens of each sequence are predicted."""
        labels = tokens.clone()
        labels[:, :n_beginning] = NOT_PREDICTED
        return cls(tokens, labels)


@dataclass(frozen=True)
class PredictionComparison:
    """The result of :func:`compare_on`; a row a model and corpus, or a part of one.

    evaluation: corpus, model, sequences, tokens (predicted), loss_nats, standard_error (over sequences),
        delta_loss_nats and delta_standard_error (to the first model, paired), entropy_nats (of the output), accuracy,
        ece (expected calibration error), jsd_nats (Jensen-Shannon divergence to the first model).
    calibration: corpus, model, low, high, tokens, confidence, accuracy; a row a bin of the confidence.
    positions: corpus, model, position (from 1), tokens, loss_nats, jsd_nats.
    """

    evaluation: pd.DataFrame
    calibration: pd.DataFrame
    positions: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> PredictionComparison | None:
        """What :meth:`write` wrote into ``folder``; None if nothing."""
        paths = [folder / f"{field.name}.csv" for field in fields(cls)]
        return cls(*map(pd.read_csv, paths)) if all(map(exists, paths)) else None

    def write(self, folder: Path) -> None:
        """Writes a CSV file a frame, and the figures ``calibration`` and ``loss-by-position``, into ``folder``."""
        save_figure(reliability_diagrams(self.calibration, self.evaluation), folder / FIGURES_FOLDER, "calibration")
        save_figure(loss_by_position(self.positions), folder / FIGURES_FOLDER, "loss-by-position")
        for field, frame in zip(fields(self), self._frames(), strict=True):
            write_text(folder / f"{field.name}.csv", frame.to_csv(index=False, na_rep="nan"))

    def together(self, other: PredictionComparison) -> PredictionComparison:
        """The rows of both."""
        pairs = zip(self._frames(), other._frames(), strict=True)
        return PredictionComparison(*(pd.concat(pair, ignore_index=True) for pair in pairs))

    def without(self, corpora: Collection[str]) -> PredictionComparison:
        """The rows of all other corpora."""
        return PredictionComparison(*(frame[~frame["corpus"].isin(corpora)] for frame in self._frames()))

    def _frames(self) -> list[pd.DataFrame]:
        return [getattr(self, field.name) for field in fields(self)]


def compare_on(texts: Mapping[str, Text], models: Mapping[str, Loader]) -> PredictionComparison:
    """The predictions of ``models`` on ``texts``, by corpus; divergences and differences are to the first model.

    The first model stays in memory, and one other at a time.

    Raises:
        InputError: a model has another vocabulary than the first.
    """
    (first, load_first), *others = models.items()
    original = load_first()
    found: dict[str, dict[str, Predictions]] = {corpus: {} for corpus in texts}

    def measure(models: dict[str, PreTrainedModel]) -> None:
        for corpus, (tokens, labels) in texts.items():
            what = f"{len(tokens)} sequences of {tokens.shape[1]} tokens of {corpus}"
            with stage(f"predictions of {' and '.join(models)} on {what}"):
                measured = predictions(list(models.values()), tokens, labels)
            found[corpus] |= dict(zip(models, measured, strict=True))

    for name, load in others:
        model = load()
        sizes = [each.config.get_text_config().vocab_size for each in (original, model)]
        if len(set(sizes)) > 1:
            raise InputError(
                f"{first} and {name} have vocabularies of {sizes[0]} and {sizes[1]} tokens, so their predictions "
                "cannot be compared; give models of one vocabulary"
            )
        measure({first: original, name: model})
    if not others:
        measure({first: original})
    return _frames(found)


def _frames(found: Mapping[str, Mapping[str, Predictions]]) -> PredictionComparison:
    rows, calibration, positions = [], [], []
    for corpus, by_model in found.items():
        original = next(iter(by_model.values()))
        for model, each in by_model.items():
            names = {"corpus": corpus, "model": model}
            sizes = {"sequences": len(each.is_predicted), "tokens": int(each.is_predicted.sum())}
            summary = each.summary()
            increase = dict(zip(("delta_loss_nats", "delta_standard_error"), each.loss_increase(original), strict=True))
            loss = {name: summary.pop(name) for name in ("loss_nats", "standard_error")}
            rows.append({**names, **sizes, **loss, **increase, **summary})
            calibration.append(pd.DataFrame({**names, **each.calibration()}))
            positions.append(pd.DataFrame({**names, **each.positions()}))
    parts = (pd.concat(each, ignore_index=True) for each in (calibration, positions))
    return PredictionComparison(pd.DataFrame(rows), *parts)
