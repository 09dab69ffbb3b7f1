"""The data frames of a report, read from the run folders of a study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from normfree.columns import DELTA_PERCENT, ENTROPY_NATS, ENTROPY_THRESHOLD_NATS, EVAL_LOSS, EVAL_PPL, NEGATIVE_SLOPE
from normfree.report.frames import NONFINITE_COUNTS, SIGNAL_STATISTICS, THRESHOLDS
from normfree.training import RunResult, load_run_config
from normfree.training.records import LAYERS_FILE, METRICS_FILE
from normfree.training.run_folder import CONFIG_FILE, last_checkpoint

KEY = ("model", "context_length", "configuration", "seed")


def results_frame(results: Iterable[RunResult], labels: Sequence[str], baseline: str) -> pd.DataFrame:
    """One row a run, in the order of ``labels``, with Δ % of perplexity against ``baseline`` with the same seed.

    Columns: those of a run's ``results.csv``, then ``delta_percent`` (NaN where the baseline is missing).
    """
    frame = pd.DataFrame([result.row for result in results])
    order = {label: place for place, label in enumerate(labels)}
    frame = frame.sort_values(
        ["seed", "configuration"],
        key=lambda column: column.map(order) if column.name == "configuration" else column,
    ).reset_index(drop=True)
    reference = frame[frame["configuration"] == baseline].set_index("seed")[EVAL_PPL]
    frame[DELTA_PERCENT] = 100 * (frame[EVAL_PPL] / frame["seed"].map(reference) - 1)
    return frame


def head_entropy_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, layer, head, entropy_nats: final weights, evaluation tokens."""
    return pd.concat([result.head_entropy.assign(**run_key(result)) for result in results], ignore_index=True)


def sequence_losses_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, sequence, loss_nats: the same sequences for every run."""
    return pd.concat([result.sequence_losses.assign(**run_key(result)) for result in results], ignore_index=True)


def eval_curve_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, tokens, eval_loss: each evaluation during training."""
    curves = []
    for result in results:
        metrics = pd.read_parquet(result.folder / METRICS_FILE)
        curve = metrics[metrics["name"] == EVAL_LOSS]
        curves.append(curve[["step", "tokens"]].assign(eval_loss=curve["value"], **run_key(result)))
    return pd.concat(curves, ignore_index=True)


def layer_entropy_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, layer, entropy_nats: mean over heads, training batches.

    A layer with a NaN head is NaN.
    """
    frames = []
    for result in results:
        layers = pd.read_parquet(result.folder / LAYERS_FILE)
        heads = layers[layers["name"] == ENTROPY_NATS]
        means = heads.groupby(["step", "layer"])["value"].agg(lambda values: values.mean(skipna=False))
        frames.append(means.rename(ENTROPY_NATS).reset_index().assign(**run_key(result)))
    return pd.concat(frames, ignore_index=True)


def nonfinite_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, layer, and the four NaN and Inf counts of the layer.

    See :data:`normfree.report.frames.NONFINITE`; training batches.
    """
    frames = []
    for result in results:
        layers = pd.read_parquet(result.folder / LAYERS_FILE)
        counts = layers[layers["name"].isin(NONFINITE_COUNTS)].pivot(
            index=["step", "layer"], columns="name", values="value"
        )
        frames.append(counts.astype("int64").reset_index().assign(**run_key(result)))
    return pd.concat(frames, ignore_index=True)


def threshold_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, layer, head, entropy_nats, entropy_threshold_nats.

    Training batches; the last step has thresholds alone. Runs that learn none have no rows.
    """
    names = [ENTROPY_NATS, ENTROPY_THRESHOLD_NATS]
    frames = []
    for result in results:
        layers = pd.read_parquet(result.folder / LAYERS_FILE)
        if ENTROPY_THRESHOLD_NATS in layers["name"].array:
            heads = layers[layers["name"].isin(names)]
            table = heads.pivot(index=["step", "layer", "head"], columns="name", values="value")
            frames.append(table[names].reset_index().assign(**run_key(result)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(THRESHOLDS))


def slope_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, layer, negative_slope: where it is learned; no row elsewhere.

    A slope that all layers share is that of the first of them.
    """
    frames = []
    for result in results:
        layers = pd.read_parquet(result.folder / LAYERS_FILE)
        slopes = layers.loc[layers["name"] == NEGATIVE_SLOPE, ["step", "layer", "value"]]
        if load_run_config(result.folder / CONFIG_FILE).model.get("slope_sharing") == "global":
            slopes = slopes[slopes["layer"] == slopes["layer"].min()]
        frames.append(slopes.rename(columns={"value": NEGATIVE_SLOPE}).assign(**run_key(result)))
    return pd.concat(frames, ignore_index=True)


def measured_frame(results: Iterable[RunResult], file: str) -> pd.DataFrame:
    """What a study's measurement left in ``file`` of each run, with model, context_length, configuration and seed."""
    return pd.concat(
        [pd.read_parquet(each.folder / file).assign(**run_key(each)) for each in results], ignore_index=True
    )


def signal_dynamics_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, layer and each of SIGNAL_STATISTICS: training batches.

    Runs without these statistics in their telemetry have no rows.
    """
    frames = []
    for result in results:
        layers = pd.read_parquet(result.folder / LAYERS_FILE)
        recorded = layers[layers["name"].isin(SIGNAL_STATISTICS)]
        if set(recorded["name"]) == set(SIGNAL_STATISTICS):
            table = recorded.pivot(index=["step", "layer"], columns="name", values="value").reset_index()
            frames.append(table.assign(**run_key(result)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*KEY, "step", "layer"])


def run_key(result: RunResult) -> dict[str, Any]:
    """The columns that name a run: model, context_length, configuration, seed."""
    return {name: result.row[name] for name in KEY}


def final_checkpoint(result: RunResult) -> Path | None:
    """The checkpoint of the weights that training ended with.

    Training saves its last step, unless the weights were no longer finite: then there is none.
    """
    newest = last_checkpoint(result.folder)
    return newest if newest is not None and newest.name == f"checkpoint-{result.row['steps']}" else None
