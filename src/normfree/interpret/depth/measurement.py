"""All depth diagnostics of one model, as tidy frames."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from normfree.columns import LOSS_NATS, STANDARD_ERROR
from normfree.errors import InputError
from normfree.files import write_text
from normfree.interpret.depth.angular_distance import angular_distance_frame, angular_distances
from normfree.interpret.depth.averages import mean_and_standard_error
from normfree.interpret.depth.block_calls import check_independence, record
from normfree.interpret.depth.effective_depth import effective_depth
from normfree.interpret.depth.gradient_norms import measure_gradient_norms
from normfree.interpret.depth.jacobian import jacobian_frame, squared_jacobian_distances
from normfree.interpret.depth.layer_skipping import loss_increase_frame, losses_without_each, losses_without_last
from normfree.interpret.depth.variance import WITHOUT_FIRST, nonfinite_entries, residual_variances, variance_frames
from normfree.modeling.float32_products import FastProducts
from normfree.progress import track

UNDECIDED = "undecided"
"""The law of growth if none could be fitted."""


@dataclass(frozen=True)
class DepthMeasurement:
    """The result of :func:`measure_depth`; layers count from 0.

    residual_variance, variance_growth: see :func:`~normfree.interpret.depth.variance.variance_frames`.
    angular_distance: see :func:`~normfree.interpret.depth.angular_distance.angular_distance_frame`.
    skipped_layers, dropped_last: see :func:`~normfree.interpret.depth.layer_skipping.loss_increase_frame`.
    jacobian_distance: see :func:`~normfree.interpret.depth.jacobian.jacobian_frame`.
    gradient_norms: see :func:`~normfree.interpret.depth.gradient_norms.measure_gradient_norms`.
    summary: one row, see :func:`measure_depth`.
    """

    residual_variance: pd.DataFrame
    variance_growth: pd.DataFrame
    angular_distance: pd.DataFrame
    skipped_layers: pd.DataFrame
    dropped_last: pd.DataFrame
    jacobian_distance: pd.DataFrame
    gradient_norms: pd.DataFrame
    summary: pd.DataFrame

    def frames(self, **run: Any) -> dict[str, pd.DataFrame]:
        """The frames by name; their first columns are ``run`` (model, configuration, seed ...)."""
        frames = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: frame.assign(**run)[[*run, *frame.columns]] for name, frame in frames.items()}


@FastProducts()
def measure_depth(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    n_probe: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    n_beginning: int = 0,
) -> DepthMeasurement:
    """All depth diagnostics of ``model``, a transformers decoder in evaluation mode, on ``tokens``.

    A batch costs four forward passes, half a pass a layer for skipped layers, the unembedding once a layer for dropped
    ones, ``n_probe`` backward passes for the Jacobians, and a forward and backward pass for the gradients.

    Args:
        model: computes in its own precision; sums are in float64.
        tokens: int64 [n, T], no padding, T at least 2.
        n_probe: random vectors a sequence and block for the Jacobians, at least 2.
        batch_size: sequences a pass.
        seed: of the probes.
        n_beginning: tokens that every sequence begins with, and which are not predicted.

    Returns:
        The frames; the row ``summary`` has n_layer, n_sequences, sequence_length, loss_nats and its standard_error
        (over sequences), effective_depth, effective_depth_standard_error, effective_depth_share (of n_layer),
        useful_layers, deep_half_share, deep_layer_nats (see
        :func:`~normfree.interpret.depth.effective_depth.effective_depth`),
        variance_growth (the best law, all tokens but the first), variance_growth_is_distinct, variance_ratio (after
        the last block over after the first, the same tokens), and nonfinite_entries of the residual stream.

    Raises:
        InputError: the tokens do not fit the model, the model is in training mode, or its blocks cannot be read (see
            :func:`~normfree.interpret.depth.block_calls.record` and ``check_independence``).
    """
    check_measurable(model, tokens)
    if n_probe < 2:
        raise InputError(f"need at least 2 probes of the Jacobians for a standard error, got {n_probe}")
    generator = torch.Generator().manual_seed(seed)
    read = track(tokens.split(batch_size), "variance, skipped layers and Jacobians", unit="batches")
    batches = [_measure_batch(model, batch, n_beginning, n_probe, generator) for batch in read]
    losses, variances, nonfinite, angles, without_each, without_last, jacobians = (
        torch.cat(values, dim=-1) for values in zip(*batches, strict=True)
    )
    residual_variance, variance_growth = variance_frames(variances, nonfinite)
    n_layer = len(without_each)
    return DepthMeasurement(
        residual_variance,
        variance_growth,
        angular_distance_frame(angles),
        loss_increase_frame("layer", range(n_layer), without_each, losses),
        loss_increase_frame("n_dropped", range(1, n_layer), without_last, losses),
        jacobian_frame(jacobians),
        measure_gradient_norms(model, tokens, batch_size, n_beginning),
        _summary(tokens, losses, without_each - losses, residual_variance, variance_growth),
    )


def _measure_batch(
    model: PreTrainedModel, batch: torch.Tensor, n_beginning: int, n_probe: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """What the frames are made of, sequences in the last dimension."""
    with torch.no_grad():
        recorded = record(model, batch, n_beginning)
    check_independence(recorded)
    return (
        recorded.losses(recorded.logits).double().cpu(),
        residual_variances(recorded.streams),
        nonfinite_entries(recorded.streams),
        angular_distances(recorded.streams),
        losses_without_each(recorded),
        losses_without_last(recorded),
        squared_jacobian_distances(recorded, n_probe, generator),
    )


@torch.no_grad()
def measure_angular_distance(model: PreTrainedModel, tokens: torch.Tensor, batch_size: int = 8) -> pd.DataFrame:
    """The frame ``angular_distance`` of :func:`measure_depth` alone, from one forward pass a batch."""
    check_measurable(model, tokens)
    read = track(tokens.split(batch_size), "angular distance", unit="batches")
    return angular_distance_frame(
        torch.cat([angular_distances(record(model, batch).streams) for batch in read], dim=-1)
    )


def write_depth(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    """Writes each of ``frames`` into ``folder`` as a CSV file of its name; NaN is written as nan."""
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False, na_rep="nan"))


def check_measurable(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Checks that ``model`` is in evaluation mode and can read ``tokens``, int64 [n, T].

    Raises:
        InputError: it is in training mode, or the tokens do not fit it or hold no sequence of two.
    """
    if model.training:
        raise InputError("the model is in training mode, where dropout makes passes differ; call model.eval()")
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError(
            f"tokens must be int64 [n, T] with n at least 1 and T at least 2; got {tokens.dtype} {list(tokens.shape)}"
        )
    config = model.config.get_text_config()
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise InputError(
            f"the tokens are ids from {int(tokens.min())} to {int(tokens.max())}; the vocabulary of "
            f"{type(model).__name__} is 0 to {config.vocab_size - 1}: give the tokenizer it was trained with"
        )
    n_positions = getattr(config, "max_position_embeddings", None)
    # XLNet has -1: no limit.
    if n_positions is not None and 0 < n_positions < tokens.shape[1]:
        raise InputError(f"the sequences have {tokens.shape[1]} tokens, {type(model).__name__} {n_positions} positions")


def _summary(
    tokens: torch.Tensor,
    losses: torch.Tensor,
    increases: torch.Tensor,
    residual_variance: pd.DataFrame,
    variance_growth: pd.DataFrame,
) -> pd.DataFrame:
    n_layer = len(increases)
    loss, error = mean_and_standard_error(losses)
    depth = effective_depth(increases.numpy())
    by_layer = residual_variance[residual_variance["tokens"] == WITHOUT_FIRST].set_index("layer")
    variance = by_layer["residual_variance"]
    best = variance_growth[variance_growth["is_best"] & (variance_growth["tokens"] == WITHOUT_FIRST)]
    row = {
        "n_layer": n_layer,
        "n_sequences": tokens.shape[0],
        "sequence_length": tokens.shape[1],
        LOSS_NATS: float(loss),
        STANDARD_ERROR: float(error),
        "effective_depth": depth.effective_depth,
        "effective_depth_standard_error": depth.standard_error,
        "effective_depth_share": depth.effective_depth / n_layer,
        "useful_layers": depth.useful_layers,
        "deep_half_share": depth.deep_half_share,
        "deep_layer_nats": depth.deep_layer_nats,
        "variance_growth": UNDECIDED if best.empty else best["law"].iloc[0],
        "variance_growth_is_distinct": bool(best["is_distinct"].any()),
        "variance_ratio": variance.iloc[-1] / variance.iloc[1],
        "nonfinite_entries": int(by_layer["nonfinite_entries"].sum()),
    }
    return pd.DataFrame([row])
