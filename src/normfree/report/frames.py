"""The pandas frames a report is made from: their columns, and the checks that fail early and in one line.

``model``, ``context_length``, ``configuration`` and ``seed`` name a run. A run that diverged has NaN in its
rows; a missing row is never read as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from normfree.columns import (
    ENTROPY_NATS,
    ENTROPY_THRESHOLD_NATS,
    EVAL_LOSS,
    EVAL_PPL,
    LOSS_NATS,
    NEGATIVE_SLOPE,
    RESIDUAL_EXCESS_KURTOSIS,
    RESIDUAL_INF_COUNT,
    RESIDUAL_KURTOSIS,
    RESIDUAL_MAX_OVER_MEDIAN,
    RESIDUAL_NAN_COUNT,
    RESIDUAL_RMS,
    SCORES_INF_COUNT,
    SCORES_NAN_COUNT,
    TOKEN_COSINE_SIMILARITY,
)
from normfree.errors import InputError

FloatArray = npt.NDArray[np.float64]

SETTING = ("model", "context_length")
RESULTS = (*SETTING, "configuration", "seed", EVAL_LOSS, EVAL_PPL, "status")
HEAD_ENTROPY = (*SETTING, "configuration", "seed", "layer", "head", ENTROPY_NATS)
EVAL_CURVE = (*SETTING, "configuration", "seed", "step", "tokens", EVAL_LOSS)
LAYER_ENTROPY = (*SETTING, "configuration", "seed", "step", "layer", ENTROPY_NATS)
DECAY_ONLY = ("configuration", "step", NEGATIVE_SLOPE)
SLOPES = (*SETTING, "configuration", "seed", "step", "layer", NEGATIVE_SLOPE)
SIGNAL_STATISTICS = (
    RESIDUAL_RMS,
    RESIDUAL_KURTOSIS,
    RESIDUAL_EXCESS_KURTOSIS,
    RESIDUAL_MAX_OVER_MEDIAN,
    TOKEN_COSINE_SIMILARITY,
)
NONFINITE_COUNTS = (SCORES_NAN_COUNT, SCORES_INF_COUNT, RESIDUAL_NAN_COUNT, RESIDUAL_INF_COUNT)
NONFINITE = (*SETTING, "configuration", "seed", "step", "layer", *NONFINITE_COUNTS)
THRESHOLDS = (*SETTING, "configuration", "seed", "step", "layer", "head", ENTROPY_NATS, ENTROPY_THRESHOLD_NATS)
SEQUENCE_LOSSES = ("configuration", "seed", "sequence", LOSS_NATS)


def check_frame(frame: pd.DataFrame, name: str, columns: Sequence[str], values: Sequence[str]) -> None:
    """Checks that ``frame`` has ``columns``, at least one row, and no two rows about the same thing.

    ``values`` are the measured columns; all others together are the key that has to be unique.

    Raises:
        InputError: a column is missing, there is no row, or a key occurs twice.
    """
    check_columns(frame, name, columns)
    if frame.empty:
        raise InputError(f"the {name} frame has no rows; give at least one run")
    key = [column for column in columns if column not in values]
    twice = frame.duplicated(key)
    if twice.any():
        first = frame.loc[twice, key].iloc[0].to_dict()
        shown = ", ".join(f"{column} {value}" for column, value in first.items())
        raise InputError(f"the {name} frame has more than one row for {shown}; give one row each")


def check_columns(frame: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Checks that ``frame`` has ``columns``; it may have more, and no row.

    Raises:
        InputError: it is no DataFrame, or a column is missing.
    """
    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"the {name} frame is a {type(frame).__name__}; give a DataFrame with {', '.join(columns)}")
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InputError(f"the {name} frame lacks {', '.join(missing)}; it needs the columns {', '.join(columns)}")


def check_one_setting(frame: pd.DataFrame, name: str) -> None:
    """Checks that all rows are about one model and context length, so that configurations are comparable.

    Raises:
        InputError: there are several.
    """
    settings = frame[list(SETTING)].drop_duplicates()
    if len(settings) > 1:
        shown = "; ".join(f"{row[0]}, T = {row[1]}" for row in settings.to_numpy().tolist())
        raise InputError(f"the {name} frame mixes several models or context lengths ({shown}); select one of them")


def seed_pairs(runs: pd.DataFrame, first: str, second: str, column: str) -> tuple[pd.Series[float], pd.Series[float]]:
    """``column`` of two configurations in the seeds that both have, by seed; a NaN of either stays.

    Args:
        runs: configuration, seed and ``column``; no run twice.
        first, second: configurations; one without runs has no pairs.
    """
    of_first, of_second = (runs[runs["configuration"] == each].set_index("seed")[column] for each in (first, second))
    return of_first.align(of_second, join="inner")


def in_order(values: pd.Series) -> list[Any]:
    """The distinct values in the order of first appearance, which figures and tables keep."""
    return list(dict.fromkeys(values.tolist()))


def head_grid(frame: pd.DataFrame) -> tuple[FloatArray, list[int], list[int], list[int]]:
    """The entropies of one configuration as ``[n_seed, n_layer, n_head]``, with the seeds, layers and heads.

    Raises:
        InputError: a cell is missing; a head without a value is a row with NaN.
    """
    axes = [sorted(in_order(frame[column])) for column in ("seed", "layer", "head")]
    entropy = frame.set_index(["seed", "layer", "head"])[ENTROPY_NATS]
    full = pd.MultiIndex.from_product(axes)
    missing = [cell for cell in full if cell not in entropy.index]
    if missing:
        seed, layer, head = missing[0]
        configuration = frame["configuration"].iloc[0]
        raise InputError(
            f"the head_entropy frame has no row for layer {layer}, head {head} of {configuration!r} "
            f"(seed {seed}); every layer needs all heads, with NaN where there is no value"
        )
    values = entropy.reindex(full).to_numpy(dtype=np.float64)
    return values.reshape([len(axis) for axis in axes]), axes[0], axes[1], axes[2]
