"""Uncertainty of what a report states: intervals over seeds, paired differences, shares of heads.

NaN is never left out of a mean: where one of the averaged runs is NaN, so is the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from normfree.columns import ENTROPY_NATS, LOSS_NATS
from normfree.entropy import entropy_bands
from normfree.errors import InputError, unknown_name
from normfree.report.frames import HEAD_ENTROPY, SEQUENCE_LOSSES, SETTING, FloatArray, check_frame, in_order

BANDS = ("band_1", "band_2", "band_3", "band_4")
BAND_LABELS = ("[0, max/4)", "[max/4, max/2)", "[max/2, 3max/4)", "[3max/4, max]")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its confidence interval, over ``n`` values. The bounds are NaN where ``n`` is 1."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class PairedDifference(Estimate):
    """Difference of mean evaluation loss to the baseline, nats per token, positive where the loss is higher.

    ``over`` says what the interval covers: with ``"seeds"``, ``n`` pairs of runs; with ``"sequences"``, one
    pair of runs on ``n`` evaluation sequences, so evaluation sampling only and not the spread between
    training runs.
    """

    over: Literal["seeds", "sequences"]


def mean_confidence_interval(values: Sequence[float] | FloatArray, level: float = 0.95) -> Estimate:
    """The mean of ``values`` with a Student t confidence interval (two-sided, n - 1 degrees of freedom).

    With one value the bounds are NaN. A value that is not finite makes the bounds NaN, and the mean too where
    it is NaN.

    Raises:
        InputError: there is no value, or ``level`` is not between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"the confidence level is {level}; it lies between 0 and 1, as in 0.95")
    sample = np.asarray(values, dtype=np.float64).ravel()
    n = sample.size
    if n == 0:
        raise InputError("a mean needs at least one value; none was given")
    with np.errstate(invalid="ignore"):
        mean = float(sample.mean())
    if n == 1 or not np.isfinite(sample).all():
        return Estimate(mean, float("nan"), float("nan"), n)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * float(sample.std(ddof=1)) / float(np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(sequence_losses: pd.DataFrame, baseline: str, level: float = 0.95) -> dict[str, PairedDifference]:
    """How much higher each configuration's mean evaluation loss is than the baseline's, nats per token.

    Every run was evaluated on the same sequences, so losses are subtracted sequence by sequence. With two or
    more seeds in common, each seed gives one mean difference and the t-interval is over seeds; with one, it
    is over the sequences. Seeds that only one of the two has are not pairs, and ``n`` says how many pairs
    there are. A NaN loss makes the difference NaN.

    Args:
        sequence_losses: columns configuration, seed, sequence, loss_nats (mean over the tokens of the
            sequence; all sequences have the same number of tokens).
        baseline: the configuration that is subtracted.
        level: the confidence level.

    Raises:
        InputError: ``baseline`` is not in the frame, runs cover different sequences, or a configuration has
            no seed in common with the baseline.
    """
    check_frame(sequence_losses, "sequence_losses", SEQUENCE_LOSSES, (LOSS_NATS,))
    configurations = in_order(sequence_losses["configuration"])
    if baseline not in configurations:
        raise unknown_name("baseline configuration", baseline, configurations)
    n_sequences = sequence_losses["sequence"].nunique()
    for _, run in sequence_losses.groupby(["configuration", "seed"]):
        if len(run) != n_sequences:
            configuration, seed = run[["configuration", "seed"]].iloc[0]
            raise InputError(
                f"the sequence_losses frame has {len(run)} of {n_sequences} sequences for {configuration!r} "
                f"(seed {seed}); paired differences need the same evaluation sequences of every run"
            )
    losses = {
        configuration: sequence_losses[sequence_losses["configuration"] == configuration].pivot(
            index="sequence", columns="seed", values=LOSS_NATS
        )
        for configuration in configurations
    }
    return {
        configuration: _difference(losses[configuration], losses[baseline], configuration, baseline, level)
        for configuration in configurations
        if configuration != baseline
    }


def _difference(
    losses: pd.DataFrame, baseline_losses: pd.DataFrame, configuration: str, baseline: str, level: float
) -> PairedDifference:
    seeds = [seed for seed in losses.columns if seed in baseline_losses.columns]
    if not seeds:
        raise InputError(
            f"{configuration!r} and the baseline {baseline!r} have no seed in common; train both with the same seeds"
        )
    # One row a sequence, one column a seed.
    differences = losses[seeds].to_numpy(dtype=np.float64) - baseline_losses[seeds].to_numpy(dtype=np.float64)
    over: Literal["seeds", "sequences"] = "seeds" if len(seeds) > 1 else "sequences"
    estimate = mean_confidence_interval(differences.mean(axis=0) if over == "seeds" else differences[:, 0], level)
    return PairedDifference(estimate.mean, estimate.low, estimate.high, estimate.n, over)


def band_shares(head_entropy: pd.DataFrame) -> pd.DataFrame:
    """Shares of heads in the four quarters of the entropy range, a row each run (ReLU's Revival, Figure 2a).

    "max" is the largest finite entropy over all heads of ALL configurations of the same model, context length
    and seed. A run with a head that is not finite has NaN shares; ``nan_heads`` counts those heads.

    Returns:
        Columns model, context_length, configuration, seed, band_1 ... band_4 (shares that sum to 1),
        nan_heads and maximum_nats.
    """
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, (ENTROPY_NATS,))
    rows = []
    for _, comparison in head_entropy.groupby([*SETTING, "seed"], sort=False):
        entropy = comparison[ENTROPY_NATS]
        maximum = float(entropy[np.isfinite(entropy)].max())
        for _, run in comparison.groupby("configuration", sort=False):
            values = run[ENTROPY_NATS].to_numpy(dtype=np.float64)
            nan_heads = int(np.count_nonzero(~np.isfinite(values)))
            shares = [float("nan")] * 4 if nan_heads else entropy_bands(values, maximum).tolist()
            rows.append(
                run[[*SETTING, "configuration", "seed"]].iloc[0].to_dict()
                | dict(zip(BANDS, shares, strict=True))
                | {"nan_heads": nan_heads, "maximum_nats": maximum}
            )
    return pd.DataFrame(rows)
