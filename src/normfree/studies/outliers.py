"""Signal propagation and outliers with and without LayerNorm, and what int8 costs each model.

ReLU's Revival (Jha & Reagen, 2024) names outlier features and low precision among the reasons to drop LayerNorm; this
study measures both on the four models of the paper.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from rich.console import Console

from normfree.columns import (
    EVAL_LOSS,
    EVAL_PPL,
    RESIDUAL_EXCESS_KURTOSIS,
    RESIDUAL_KURTOSIS,
    RESIDUAL_MAX_OVER_MEDIAN,
    RESIDUAL_RMS,
    TOKEN_COSINE_SIMILARITY,
)
from normfree.data import PackedData
from normfree.devices import default_device
from normfree.interpret import PRECISIONS, check_quantization, measure_signal_propagation, quantization_cost
from normfree.progress import stage
from normfree.report import Callout, Element, Paragraph, Section, Table
from normfree.report.frames import SETTING, SIGNAL_STATISTICS, check_frame, check_one_setting, in_order
from normfree.report.numbers import mean_and_half, over_seeds
from normfree.report.signal_curves import (
    SIGNAL_PROPAGATION,
    largest_over_layers,
    signal_propagation_dynamics,
    signal_propagation_over_depth,
)
from normfree.runner import (
    KEY,
    Findings,
    Measurement,
    Study,
    StudyPage,
    final_checkpoint,
    measured_frame,
    telemetry_frame,
)
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, LAYERNORM_RELU, PAPER, RELU, scale_limits
from normfree.training import RunResult, load_pretrained
from normfree.training.records import write_parquet

SIGNAL_FILE = "signal_propagation.parquet"
QUANTIZATION_FILE = "quantization.parquet"
BATCH_SIZE = 16
QUANTIZATION = (*SETTING, "configuration", "seed", "precision", EVAL_LOSS, EVAL_PPL, "increase_percent")
OUTLIER_COLUMNS = {
    "RMS": RESIDUAL_RMS,
    "Kurtosis": RESIDUAL_KURTOSIS,
    "Excess kurtosis": RESIDUAL_EXCESS_KURTOSIS,
    "Max/median": RESIDUAL_MAX_OVER_MEDIAN,
    "Token cosine": TOKEN_COSINE_SIMILARITY,
}
PRECISION_NAMES = {
    "int8_weights": "int8 weights",
    "int8_weights_activations": "int8 weights and activations",
}


def check() -> None:
    """Checks that this machine can quantize.

    Raises:
        InputError: see :func:`normfree.interpret.check_quantization`.
    """
    check_quantization(default_device())


def measure(result: RunResult, data: PackedData, console: Console) -> None:
    """Measures the final weights of a run on all its evaluation sequences, unless that is done.

    Writes ``signal_propagation.parquet`` (see :func:`~normfree.interpret.measure_signal_propagation`) and
    ``quantization.parquet`` (see :func:`~normfree.interpret.quantization_cost`) into the run's folder; NaN for a run
    that diverged, as it has no final weights.
    """
    signal_path, quantization_path = result.folder / SIGNAL_FILE, result.folder / QUANTIZATION_FILE
    if signal_path.exists() and quantization_path.exists():
        return
    checkpoint = final_checkpoint(result)
    if checkpoint is None:
        layers = sorted(result.head_entropy["layer"].unique())
        signal = pd.DataFrame({"layer": layers, **dict.fromkeys(SIGNAL_STATISTICS, np.nan)})
        columns = (EVAL_LOSS, EVAL_PPL, "increase_percent")
        quantization = pd.DataFrame({"precision": PRECISIONS, **dict.fromkeys(columns, np.nan)})
    else:
        model = load_pretrained(str(checkpoint)).model
        sequences, _ = data.eval.whole()
        with stage(f"Measuring {result.row['configuration']} seed {result.row['seed']}"):
            signal = measure_signal_propagation(model, sequences, BATCH_SIZE)
            quantization = quantization_cost(model, sequences, BATCH_SIZE)
    write_parquet(signal, signal_path)
    write_parquet(quantization, quantization_path)


def describe(page: StudyPage) -> Findings:
    """Statistics of the trained models over depth and over training, and perplexity at each precision."""
    measured, missing = page.measured(QUANTIZATION_FILE)
    limits = scale_limits(page) + _LIMITS
    if not measured:
        return Findings("No run has been measured yet.", missing, limits)
    signal, quantization = (measured_frame(measured, file) for file in (SIGNAL_FILE, QUANTIZATION_FILE))
    signals = _signal_section(page, signal, telemetry_frame(measured, SIGNAL_STATISTICS))
    return Findings(_lead(signal, quantization), [signals, _quantization_section(quantization), *missing], limits)


def _signal_section(page: StudyPage, signal: pd.DataFrame, dynamics: pd.DataFrame) -> Section:
    blocks: list[Element] = [
        Paragraph(
            "Residual stream after each block, before any final norm. Kurtosis is that of the channels' RMS (He et "
            "al., 2024): 1 if all d channels are equally large, d if one channel holds everything. Excess kurtosis is "
            "that of all entries pooled, 0 for a normal distribution. Max/median is the ratio of the largest to the "
            "median absolute channel of a token, averaged over tokens. Token cosine is the mean cosine between the "
            "representations of two tokens of a sequence."
        ),
        Table(outlier_table(signal, layer="last"), "Last layer: final weights, evaluation tokens.", notes=_NOTES),
        Table(outlier_table(signal, layer="largest"), "The largest of all layers, each statistic for itself."),
        page.figure(
            "signal-propagation",
            signal_propagation_over_depth(signal),
            "Signal propagation over depth: final weights, evaluation tokens.",
        ),
    ]
    if len(dynamics):
        caption = "Signal propagation over training: training batches, at the last layer and at the largest of all."
        blocks.append(page.figure("signal-propagation-dynamics", signal_propagation_dynamics(dynamics), caption))
    n_silent = len(signal[[*KEY]].drop_duplicates()) - len(dynamics[[*KEY]].drop_duplicates())
    if n_silent:
        blocks.append(Callout(f"The telemetry of {n_silent} run(s) lacks these statistics over training.", "warning"))
    return Section("Signal propagation and outliers", blocks)


def _quantization_section(quantization: pd.DataFrame) -> Section:
    return Section(
        "Low precision",
        [
            Paragraph(
                "The linear layers inside the blocks of the final weights, rounded to int8 after training, with no "
                "calibration: weights symmetrically with one scale a row; activations symmetrically with one scale a "
                "token, found as they come. Embeddings, unembedding, norms and attention scores stay in full "
                "precision. All perplexities here are of the same evaluation sequences without autocast, so those "
                "of full precision can differ from the table of results in the last digits."
            ),
            Table(quantization_table(quantization), "Perplexity and its increase over full precision.", notes=_NOTES),
        ],
    )


def _lead(signal: pd.DataFrame, quantization: pd.DataFrame) -> str:
    """What the measurements say."""
    kurtosis = outlier_table(signal, layer="largest").set_index("Configuration")["Kurtosis"]
    costs = quantization_table(quantization).set_index("Configuration")[
        f"{PRECISION_NAMES['int8_weights_activations']}, Δ %"
    ]
    return (
        f"Largest channel kurtosis of any layer: {_listed(kurtosis)}. Perplexity in int8 weights and activations, "
        f"% over full precision: {_listed(costs)}."
    )


def _listed(column: pd.Series) -> str:
    return ", ".join(f"{label} {value}" for label, value in column.items())


_NOTES = (
    "± is half of a 95 % t-interval over seeds, where there are several.",
    "NaN: at least one of the runs diverged, and has no final weights.",
)

_LIMITS = (
    "Outlier features grow with the size of a model and with its training (Dettmers et al., 2022): small models that "
    "lack them say nothing about large ones. int8 costs are those of plain rounding after training; methods that "
    "treat outliers apart would cost less."
)


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
    return over_seeds(runs, OUTLIER_COLUMNS)


def quantization_table(quantization: pd.DataFrame) -> pd.DataFrame:
    """Perplexity at full precision, and in int8 with its increase in %: ``mean ± half`` over seeds.

    The increase is taken within a run and then averaged.

    Args:
        quantization: the columns ``QUANTIZATION``, one row a run and precision.

    Raises:
        InputError: a column is missing, a precision occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(quantization, "quantization", QUANTIZATION, (EVAL_LOSS, EVAL_PPL, "increase_percent"))
    check_one_setting(quantization, "quantization")
    rows = []
    for configuration in in_order(quantization["configuration"]):
        runs = quantization[quantization["configuration"] == configuration]
        full = runs.loc[runs["precision"] == "full_precision", EVAL_PPL]
        row = {"Configuration": configuration, "Seeds": len(full), "Perplexity, full precision": mean_and_half(full)}
        for precision, name in PRECISION_NAMES.items():
            chosen = runs[runs["precision"] == precision]
            row[name] = mean_and_half(chosen[EVAL_PPL])
            row[f"{name}, Δ %"] = mean_and_half(chosen["increase_percent"], signed=True)
        rows.append(row)
    return pd.DataFrame(rows)


STUDY = Study(
    name="outliers",
    title="Signal propagation, outliers and int8 with and without LayerNorm",
    question="How do outliers and int8 differ with and without LayerNorm?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, LAYERNORM_RELU, GELU, RELU),
    describe=describe,
    measurement=lambda preset: Measurement(check, measure),
    papers=(PAPER,),
)
