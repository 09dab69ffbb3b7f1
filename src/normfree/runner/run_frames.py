"""The data frames of a report, read from the run folders of a study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from normfree.columns import DELTA_PERCENT, ENTROPY_NATS, EVAL_LOSS, EVAL_PPL
from normfree.training import RunResult
from normfree.training.records import LAYERS_FILE, METRICS_FILE
from normfree.training.run_folder import last_checkpoint

KEY = ("model", "context_length", "configuration", "seed")
"""Columns that identify a run in every frame of a study."""


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


def telemetry_frame(
    results: Iterable[RunResult], names: Sequence[str], by: Sequence[str] = ("step", "layer")
) -> pd.DataFrame:
    """model, context_length, configuration, seed, the columns ``by``, and a column for each of ``names``.

    Values of ``layers.parquet``, read on training batches; ``by`` has "head" too for what is recorded of each head.
    Runs whose telemetry lacks one of ``names`` have no rows.
    """
    frames = [pd.DataFrame(columns=[*KEY, *by, *names])]
    for result in results:
        layers = pd.read_parquet(result.folder / LAYERS_FILE)
        recorded = layers[layers["name"].isin(names)]
        if set(recorded["name"]) == set(names):
            table = recorded.pivot(index=list(by), columns="name", values="value")
            frames.append(table[list(names)].reset_index().assign(**run_key(result)))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def layer_entropy_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, layer, entropy_nats: mean over heads, training batches.

    A layer with a NaN head is NaN.
    """
    heads = telemetry_frame(results, [ENTROPY_NATS], ("step", "layer", "head"))
    means = heads.groupby([*KEY, "step", "layer"], sort=False)[ENTROPY_NATS]
    return means.agg(lambda values: values.mean(skipna=False)).reset_index()


def measured_frame(results: Iterable[RunResult], file: str) -> pd.DataFrame:
    """A study's measurements in the Parquet or CSV ``file`` of each run, with the columns of :func:`run_key`."""
    read: Any = pd.read_csv if file.endswith(".csv") else pd.read_parquet
    return pd.concat([read(each.folder / file).assign(**run_key(each)) for each in results], ignore_index=True)


def run_key(result: RunResult) -> dict[str, Any]:
    """The columns that name a run: model, context_length, configuration, seed."""
    return {name: result.row[name] for name in KEY}


def final_checkpoint(result: RunResult) -> Path | None:
    """The checkpoint of the weights that training ended with.

    Training saves its last step, unless the weights were no longer finite: then there is none.
    """
    newest = last_checkpoint(result.folder)
    return newest if newest is not None and newest.name == f"checkpoint-{result.row['steps']}" else None
