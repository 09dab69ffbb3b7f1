"""Tables of outliers and of the price of low precision, a row a configuration, with intervals over seeds."""

import pandas as pd

from normfree.report.frames import SETTING, check_frame, check_one_setting, in_order
from normfree.report.numbers import mean_and_half
from normfree.report.signal_propagation import SIGNAL_PROPAGATION, SIGNAL_STATISTICS, largest_over_layers

QUANTIZATION = (*SETTING, "configuration", "seed", "precision", "eval_loss", "eval_ppl", "increase_percent")
OUTLIER_COLUMNS = {
    "RMS": "residual_rms",
    "Kurtosis": "residual_kurtosis",
    "Excess kurtosis": "residual_excess_kurtosis",
    "Max/median": "residual_max_over_median",
    "Token cosine": "token_cosine_similarity",
}
PRECISION_NAMES = {
    "int8_weights": "int8 weights",
    "int8_weights_activations": "int8 weights and activations",
}


def outlier_table(signal: pd.DataFrame, *, layer: str) -> pd.DataFrame:
    """The statistics of the trained models as a reader sees them: ``mean ± half`` of a 95 % t-interval over seeds.

    Args:
        signal: the columns ``SIGNAL_PROPAGATION``.
        layer: ``"last"``, or ``"largest"`` for the largest value over the layers.

    Raises:
        InputError: a column is missing, a layer occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(signal, "signal propagation", SIGNAL_PROPAGATION, SIGNAL_STATISTICS)
    check_one_setting(signal, "signal propagation")
    if layer == "last":
        runs = signal[signal["layer"] == signal["layer"].max()]
    else:
        runs = largest_over_layers(signal, ["configuration", "seed"])
    rows = []
    for configuration in in_order(runs["configuration"]):
        chosen = runs[runs["configuration"] == configuration]
        cells = {name: mean_and_half(chosen[statistic]) for name, statistic in OUTLIER_COLUMNS.items()}
        rows.append({"Configuration": configuration, "Seeds": len(chosen), **cells})
    return pd.DataFrame(rows)


def quantization_table(quantization: pd.DataFrame) -> pd.DataFrame:
    """Perplexity at full precision, and in int8 with its increase in %: ``mean ± half`` over seeds.

    The increase is taken within a run and then averaged.

    Args:
        quantization: the columns ``QUANTIZATION``, one row a run and precision.

    Raises:
        InputError: a column is missing, a precision occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(quantization, "quantization", QUANTIZATION, ("eval_loss", "eval_ppl", "increase_percent"))
    check_one_setting(quantization, "quantization")
    rows = []
    for configuration in in_order(quantization["configuration"]):
        runs = quantization[quantization["configuration"] == configuration]
        full = runs.loc[runs["precision"] == "full_precision", "eval_ppl"]
        row = {"Configuration": configuration, "Seeds": len(full), "Perplexity, full precision": mean_and_half(full)}
        for precision, name in PRECISION_NAMES.items():
            chosen = runs[runs["precision"] == precision]
            row[name] = mean_and_half(chosen["eval_ppl"])
            row[f"{name}, Δ %"] = mean_and_half(chosen["increase_percent"], signed=True)
        rows.append(row)
    return pd.DataFrame(rows)
