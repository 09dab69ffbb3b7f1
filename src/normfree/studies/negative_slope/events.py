"""When a training run becomes unstable: its first NaN or Inf, and the collapse of its attention entropy.

Entropy collapse is "pathologically low attention entropy, corresponding to highly concentrated attention scores" (Zhai
et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023, the source of ReLU's
Revival). Neither paper gives a threshold, so it is an argument here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from normfree.columns import ENTROPY_NATS, RESIDUAL_INF_COUNT, RESIDUAL_NAN_COUNT, SCORES_INF_COUNT, SCORES_NAN_COUNT
from normfree.errors import InputError
from normfree.report.frames import LAYER_ENTROPY, NONFINITE, NONFINITE_COUNTS, SETTING, check_frame

RUN = (*SETTING, "configuration", "seed")
PLACES = {
    "attention scores": (SCORES_NAN_COUNT, SCORES_INF_COUNT),
    "residual stream": (RESIDUAL_NAN_COUNT, RESIDUAL_INF_COUNT),
}
"""Where values are counted, in the order of the forward pass through a block, and the columns that count them."""


def first_nonfinite(layers: pd.DataFrame) -> pd.DataFrame:
    """The first NaN or Inf of each run: the step of the first telemetry reading that has one, and where it arose.

    Within that reading the place is the earliest of the forward pass, since everything behind it inherits the NaN: the
    lowest layer, and within it the attention scores before the residual stream, which is read after the block.

    Args:
        layers: columns model, context_length, configuration, seed, step, layer, and the counts scores_nan_count,
            scores_inf_count, residual_nan_count and residual_inf_count.

    Returns:
        One row a run, in the order of ``layers``: model, context_length, configuration, seed; step and layer (Int64),
        place (a key of :data:`PLACES`), nan_count and inf_count there (Int64). All five are NA for a run without any.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or a count is missing or negative.
    """
    check_frame(layers, "layers", NONFINITE, NONFINITE_COUNTS)
    if not (layers[list(NONFINITE_COUNTS)] >= 0).all(axis=None):
        raise InputError("the layers frame has a count that is missing or negative; a layer without any has 0")
    rows = []
    for key, run in layers.groupby(list(RUN), sort=False):
        found: dict[str, Any] = {"step": pd.NA, "layer": pd.NA, "place": pd.NA, "nan_count": pd.NA, "inf_count": pd.NA}
        nonfinite = run[(run[list(NONFINITE_COUNTS)] > 0).any(axis=1)]
        if len(nonfinite):
            first = nonfinite.sort_values(["step", "layer"]).iloc[0]
            place, (nan, inf) = next(each for each in PLACES.items() if (first[list(each[1])] > 0).any())
            found = {"step": first["step"], "layer": first["layer"], "place": place}
            found |= {"nan_count": first[nan], "inf_count": first[inf]}
        rows.append(dict(zip(RUN, key, strict=True)) | found)
    integers = dict.fromkeys(("step", "layer", "nan_count", "inf_count"), "Int64")
    return pd.DataFrame(rows).astype({**integers, "place": "string"})


def entropy_collapse(layer_entropy: pd.DataFrame, bound: float, *, share: float = 0.1) -> pd.DataFrame:
    """The step from which each layer's attention entropy has collapsed.

    That is the first telemetry step at which the mean entropy of the layer's heads is below ``share`` of ``bound`` and
    from which on no reading is at or above it, until the end of the run or until the layer's entropy is NaN for good.
    A layer that recovers has not collapsed. A NaN reading says nothing about entropy: it neither begins a collapse nor
    ends one, and is counted apart.

    With the default of 0.1 and T = 128 a layer has collapsed below 0.39 nats: its attention is on average as
    concentrated as one that is spread over exp(0.39) = 1.5 keys. At a quarter of the bound, where the lowest band of
    the paper's Figure 2a ends, that is 2.6 keys.

    Args:
        layer_entropy: columns model, context_length, configuration, seed, step, layer, entropy_nats.
        bound: the entropy of uniform attention in nats, :func:`normfree.entropy.uniform_entropy_bound`.
        share: the threshold as a share of ``bound``.

    Returns:
        One row a run and layer, in the order of ``layer_entropy``: model, context_length, configuration, seed, layer;
        step (Int64, NA without a collapse); nan_readings, the number of steps whose entropy is NaN.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, ``bound`` is not positive, or ``share`` does
            not lie between 0 and 1.
    """
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, (ENTROPY_NATS,))
    if not (np.isfinite(bound) and bound > 0):
        raise InputError(f"the uniform bound is {bound} nats; give a positive number, such as 3.878 for T = 128")
    if not 0 < share < 1:
        raise InputError(f"the share of the uniform bound is {share}; it lies between 0 and 1, as in 0.1")
    rows = []
    for key, readings in layer_entropy.groupby([*RUN, "layer"], sort=False):
        entropy = readings.set_index("step")[ENTROPY_NATS].sort_index()
        known = entropy[np.isfinite(entropy)]
        above = known.index[known >= share * bound]
        since = known.index[known.index > above[-1]] if len(above) else known.index
        row = dict(zip((*RUN, "layer"), key, strict=True))
        row |= {"step": since[0] if len(since) else pd.NA, "nan_readings": len(entropy) - len(known)}
        rows.append(row)
    return pd.DataFrame(rows).astype({"step": "Int64"})
