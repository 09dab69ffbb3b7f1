"""What a model predicts, token by token, and how far that is from another model's predictions.

The measures of "Transformers Don't Need LayerNorm at Inference Time" (2025): cross-entropy, entropy, Jensen-Shannon
divergence to the original model, expected calibration error, and the loss by position. Logits are made for a few
sequences at a time and reduced in blocks; of a token only its numbers are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from normfree.columns import LOSS_NATS, STANDARD_ERROR
from normfree.modeling.float32_products import FastProducts
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED
from normfree.progress import track

FloatArray = NDArray[np.float64]
CALIBRATION_BINS = 10
"""Bins of equal width of the confidence, as in the paper's public code."""
LOGIT_BYTES = 1 << 26
"""Of one forward pass."""
BLOCK_BYTES = 1 << 23
"""Of logits that are reduced together."""


@dataclass(frozen=True)
class Predictions:
    """One model's predictions of the tokens of n sequences but the first: arrays [n, T − 1].

    is_predicted: False where the other arrays count for nothing.
    losses: −ln of the probability of the token, nats.
    entropies: of the distribution over the vocabulary, nats.
    confidences: largest probability.
    is_correct: whether the most probable token is the right one.
    divergences: Jensen-Shannon divergence to the original's distribution, nats; None for the original.
    """

    is_predicted: NDArray[np.bool_]
    losses: FloatArray
    entropies: FloatArray
    confidences: FloatArray
    is_correct: NDArray[np.bool_]
    divergences: FloatArray | None

    def summary(self) -> dict[str, float]:
        """loss_nats, standard_error (of the loss over sequences), entropy_nats, accuracy, ece and jsd_nats.

        Means over the predicted tokens. ``ece`` is Σ over bins of the share of tokens in the bin times |mean confidence
        − accuracy|; ``jsd_nats`` is 0 for the original. NaN logits make NaN.
        """
        bins = self.calibration()
        share = bins["tokens"] / bins["tokens"].sum()
        gaps = (share * (bins["confidence"] - bins["accuracy"]).abs()).where(bins["tokens"] > 0, 0.0)
        known = np.isfinite(self.confidences[self.is_predicted]).all()
        return {
            LOSS_NATS: self._mean(self.losses),
            STANDARD_ERROR: self._standard_error(self.losses),
            "entropy_nats": self._mean(self.entropies),
            "accuracy": self._mean(self.is_correct) if known else np.nan,
            "ece": float(gaps.sum()) if known else np.nan,
            "jsd_nats": 0.0 if self.divergences is None else self._mean(self.divergences),
        }

    def calibration(self) -> pd.DataFrame:
        """low, high (bounds of the confidence), tokens, confidence and accuracy (means of the bin; NaN if empty).

        A bin holds low ≤ confidence < high, the last one also 1. Tokens with NaN logits are in none.
        """
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        inside = self.is_predicted & np.isfinite(self.confidences)
        confidences, is_correct = self.confidences[inside], self.is_correct[inside]
        places = np.clip(np.digitize(confidences, edges) - 1, 0, CALIBRATION_BINS - 1)
        tokens, confidence, correct = (
            np.bincount(places, weights, CALIBRATION_BINS) for weights in (None, confidences, is_correct)
        )
        with np.errstate(invalid="ignore"):
            means = {"confidence": confidence / tokens, "accuracy": correct / tokens}
        return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "tokens": tokens, **means})

    def positions(self) -> pd.DataFrame:
        """position (of the predicted token, from 1), tokens, loss_nats and jsd_nats; means over sequences.

        Positions at which no token is predicted are left out.
        """
        tokens = self.is_predicted.sum(axis=0)
        seen = np.flatnonzero(tokens)

        def means(values: FloatArray) -> FloatArray:
            total: FloatArray = np.where(self.is_predicted, values, 0.0).sum(axis=0)[seen] / tokens[seen]
            return total

        divergences = np.zeros(len(seen)) if self.divergences is None else means(self.divergences)
        return pd.DataFrame(
            {"position": seen + 1, "tokens": tokens[seen], LOSS_NATS: means(self.losses), "jsd_nats": divergences}
        )

    def loss_increase(self, original: Predictions) -> tuple[float, float]:
        """Mean loss less that of ``original`` on the same tokens, and its standard error over sequences, nats."""
        increase = self.losses - original.losses
        return self._mean(increase), self._standard_error(increase)

    def _mean(self, values: NDArray[np.generic]) -> float:
        return float(values[self.is_predicted].mean(dtype=np.float64))

    def _standard_error(self, values: FloatArray) -> float:
        """Of the mean over tokens, sequences being independent (ratio estimator); NaN for one sequence."""
        counts = self.is_predicted.sum(axis=1)
        sums = np.where(self.is_predicted, values, 0.0).sum(axis=1)[counts > 0]
        counts = counts[counts > 0]
        n = len(counts)
        if n < 2:
            return np.nan
        rest = sums - counts * (sums.sum() / counts.sum())
        return float(sqrt(n / (n - 1) * np.square(rest).sum()) / counts.sum())


@FastProducts()
@torch.no_grad()
def predictions(
    models: Sequence[PreTrainedModel], sequences: Tensor, labels: Tensor | None = None
) -> list[Predictions]:
    """Runs each of ``models`` over ``sequences``, int64 [n, T] without padding; divergences are to the first.

    The models keep their mode. Softmax and divergences are float32 (float64 for float64 models); the rounding of a
    divergence is about 1e-7 nats.

    Args:
        models: causal language models of transformers with one vocabulary.
        sequences: T at least 2.
        labels: -100 where a token is not predicted; default: the sequences.
    """
    labels = sequences if labels is None else labels
    n_bytes = sequences.shape[1] * models[0].config.get_text_config().vocab_size * 4
    size = max(1, min(8, LOGIT_BYTES // n_bytes))
    rows: list[list[Tensor]] = [[] for _ in models]
    batches = list(zip(sequences.split(size), labels.split(size), strict=True))
    for tokens, targets in track(batches, "predictions", unit="batches"):
        original: Tensor | None = None
        for model, own in zip(models, rows, strict=True):
            logits = _logits(model, tokens)
            reference = None if original is None else original.to(logits.device)
            own.append(_reduced(logits, targets[:, 1:].reshape(-1).to(logits.device), reference).cpu())
            original = logits if original is None else original
    is_predicted = (labels[:, 1:] != NOT_PREDICTED).numpy()
    return [_of_tokens(torch.cat(each), is_predicted) for each in rows]


def _of_tokens(rows: Tensor, is_predicted: NDArray[np.bool_]) -> Predictions:
    """The columns of :func:`_reduced` by sequence."""
    losses, entropies, confidences, is_correct, *rest = rows.double().T.reshape(-1, *is_predicted.shape).numpy()
    return Predictions(is_predicted, losses, entropies, confidences, is_correct == 1, rest[0] if rest else None)


@torch.no_grad()
def unembedded_predictions(unembedding: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target and entropy of its distribution, nats: float64 [2, n].

    Args:
        unembedding: to [vocab_size].
        hidden: the normalized final residual stream of n tokens, [n, n_embd].
        targets: the tokens that follow them, int64 [n].
    """
    size = _rows_of_a_block(len(unembedding.weight))
    blocks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([_reduced(_wide(unembedding(each)), target, None)[:, :2].double() for each, target in blocks]).T


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2, nats, over the last dim; from 0 to ln 2."""
    log_m = torch.logaddexp(log_p, log_q) - log(2)
    divergence = (_expectation(log_p, log_p - log_m) + _expectation(log_q, log_q - log_m)) / 2
    return divergence.clamp(min=0)


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Float32 or float64 [batch (T − 1), vocab_size]."""
    return _wide(model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1].flatten(0, 1))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _rows_of_a_block(vocab_size: int) -> int:
    return max(1, BLOCK_BYTES // (vocab_size * 4))


def _reduced(logits: Tensor, targets: Tensor, others: Tensor | None) -> Tensor:
    """Loss, entropy, confidence, correctness and, with ``others``, divergence of each row: [n, 4 or 5]."""
    size = _rows_of_a_block(logits.shape[1])
    blocks = []
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        log_p, target = logits[rows].log_softmax(dim=-1), targets[rows].clamp(min=0)
        most, token = log_p.max(dim=-1)
        loss = -log_p.gather(-1, target[:, None])[:, 0]
        columns = [loss, _expectation(log_p, -log_p), most.exp(), token == target]
        if others is not None:
            columns.append(jensen_shannon(log_p, others[rows].log_softmax(dim=-1)))
        blocks.append(torch.stack([each.to(loss.dtype) for each in columns], dim=-1))
    return torch.cat(blocks)


def _expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ p · values over the last dim, with 0 where p is 0, which may have infinite values; NaN stays."""
    p = log_p.exp()
    return (p * values).masked_fill(p == 0, 0.0).sum(dim=-1)
