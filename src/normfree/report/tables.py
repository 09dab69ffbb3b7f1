"""The perplexity table of a study (ReLU's Revival, Table 2, with intervals) and how it is written down."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from normfree.columns import DELTA_PERCENT, EVAL_LOSS, EVAL_PPL
from normfree.errors import InputError, unknown_name
from normfree.report.frames import RESULTS, SETTING, check_frame, in_order, seed_pairs
from normfree.report.intervals import (
    BAND_LABELS,
    BANDS,
    Estimate,
    PairedDifference,
    band_shares,
    mean_confidence_interval,
    paired_difference,
)
from normfree.report.numbers import number, plus_minus

STATUSES = ("finished", "diverged")

_DASH = "\N{EN DASH}"
_LABELS = ("Model", "Configuration")  # columns of names; the others hold quantities


def perplexity_table(
    results: pd.DataFrame,
    head_entropy: pd.DataFrame,
    sequence_losses: pd.DataFrame,
    *,
    baseline: str = "SM+LN+G",
    published: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per model, context length and configuration; intervals are 95 % Student t-intervals.

    Args:
        results: one row a run: model, context_length, configuration, seed, eval_loss (nats per token),
            eval_ppl, status ("finished" or "diverged").
        head_entropy: see :func:`normfree.report.band_shares`.
        sequence_losses: see :func:`normfree.report.paired_difference`; with several models or context lengths
            in ``results`` it also needs the columns model and context_length.
        baseline: the configuration the differences are taken to.
        published: columns configuration, eval_ppl, delta_percent, one row a configuration: the rows of
            ``load_published("relu_revival_table2")`` for the model and context length of the caller's choice.

    Returns:
        Columns model, context_length, configuration, seeds, diverged (numbers of runs), eval_loss and
        eval_ppl (means over seeds), delta_percent (mean over seeds of the perplexity's increase over the
        baseline of the same seed, %), loss_difference (nats per token, paired by evaluation sequence), each
        with ``_low`` and ``_high``; loss_difference_over ("seeds", "sequences", or "baseline" for the baseline
        itself); band_1 ... band_4 (shares of heads, mean over seeds) and nan_heads; published_ppl and
        published_delta_percent, NaN where nothing was published.

    Raises:
        InputError: a frame lacks columns, rows or the baseline, or repeats a run.
    """
    check_frame(results, "results", RESULTS, (EVAL_LOSS, EVAL_PPL, "status"))
    for status in in_order(results["status"]):
        if status not in STATUSES:
            raise unknown_name("status in the results frame", status, STATUSES)
    shares = band_shares(head_entropy)
    rows = []
    for setting, comparison in results.groupby(list(SETTING), sort=False):
        configurations = in_order(comparison["configuration"])
        if baseline not in configurations:
            raise unknown_name("baseline configuration", baseline, configurations)
        differences = paired_difference(_of_setting(sequence_losses, setting, results), baseline)
        for configuration in configurations:
            runs = comparison[comparison["configuration"] == configuration]
            row: dict[str, Any] = {
                **dict(zip(SETTING, setting, strict=True)),
                "configuration": configuration,
                "seeds": len(runs),
                "diverged": int((runs["status"] == "diverged").sum()),
                **_interval(EVAL_LOSS, runs[EVAL_LOSS].tolist()),
                **_interval(EVAL_PPL, runs[EVAL_PPL].tolist()),
            }
            row |= _to_baseline(comparison, configuration, baseline, differences.get(configuration))
            row |= _bands(shares, setting, configuration) | _published(published, configuration)
            rows.append(row)
    return pd.DataFrame(rows)


def _to_baseline(
    comparison: pd.DataFrame, configuration: str, baseline: str, difference: PairedDifference | None
) -> dict[str, Any]:
    if configuration == baseline:
        zero = _exactly_zero(DELTA_PERCENT) | _exactly_zero("loss_difference")
        return {**zero, "loss_difference_over": "baseline"}
    percent = _interval(DELTA_PERCENT, _delta_percent(comparison, configuration, baseline))
    return percent | _loss_difference(comparison, configuration, baseline, difference)


def _of_setting(losses: pd.DataFrame, setting: Sequence[Any], results: pd.DataFrame) -> pd.DataFrame:
    if set(SETTING) <= set(losses.columns):
        return losses.merge(pd.DataFrame([setting], columns=list(SETTING)), on=list(SETTING))
    if len(results[list(SETTING)].drop_duplicates()) > 1:
        raise InputError(
            "the results frame has several models or context lengths, so the sequence_losses frame needs the "
            "columns model and context_length to tell them apart"
        )
    return losses


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    estimate = mean_confidence_interval(values)
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _exactly_zero(name: str) -> dict[str, float]:
    return {name: 0.0, f"{name}_low": 0.0, f"{name}_high": 0.0}


def _delta_percent(runs: pd.DataFrame, configuration: str, baseline: str) -> list[float]:
    perplexity, reference = seed_pairs(runs, configuration, baseline, EVAL_PPL)
    if perplexity.empty:
        raise InputError(
            f"{configuration!r} has no seed in common with the baseline in the results frame; train both with the "
            "same seeds"
        )
    percent: list[float] = (100 * (perplexity / reference - 1)).tolist()
    return percent


def _loss_difference(
    runs: pd.DataFrame, configuration: str, baseline: str, difference: PairedDifference | None
) -> dict[str, Any]:
    """NaN also where a diverged run left no sequence losses: its pair may not vanish from the mean."""
    own = runs[runs["configuration"] == configuration]
    all_finite = np.isfinite(runs.loc[runs["configuration"].isin([configuration, baseline]), EVAL_LOSS]).all()
    if difference is None and all_finite:
        raise InputError(
            f"the sequence_losses frame has no rows for {configuration!r}; give the loss of every evaluation sequence"
        )
    if difference is None or not all_finite:
        lost = float("nan")
        difference = PairedDifference(lost, lost, lost, len(own), "seeds" if len(own) > 1 else "sequences")
    return {
        "loss_difference": difference.mean,
        "loss_difference_low": difference.low,
        "loss_difference_high": difference.high,
        "loss_difference_over": difference.over,
    }


def _bands(shares: pd.DataFrame, setting: Sequence[Any], configuration: str) -> dict[str, float]:
    chosen = (shares["model"] == setting[0]) & (shares["context_length"] == setting[1])
    runs = shares[chosen & (shares["configuration"] == configuration)]
    if runs.empty:
        raise InputError(
            f"the head_entropy frame has no rows for {configuration!r} ({setting[0]}, T = {setting[1]}); "
            "give NaN for the heads of a diverged run"
        )
    means = {band: float(np.mean(runs[band].to_numpy(dtype=np.float64))) for band in BANDS}
    return means | {"nan_heads": int(runs["nan_heads"].sum())}


def _published(published: pd.DataFrame | None, configuration: str) -> dict[str, float]:
    names = {"published_ppl": EVAL_PPL, "published_delta_percent": DELTA_PERCENT}
    if published is None:
        return dict.fromkeys(names, float("nan"))
    check_frame(published, "published", ("configuration", *names.values()), tuple(names.values()))
    row = published[published["configuration"] == configuration]
    return {name: float(row[column].iloc[0]) if len(row) else float("nan") for name, column in names.items()}


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """The table as a reader sees it: strings, intervals as ``mean ± half``, shares in percent.

    Model and context length appear only where they differ between rows, published columns only where there
    are published numbers, and ``†`` marks an interval over evaluation sequences (see :func:`table_notes`).
    """
    columns: dict[str, list[str]] = {}
    if len(table[list(SETTING)].drop_duplicates()) > 1:
        columns |= {"Model": table["model"].astype(str).tolist()}
        columns |= {"T": table["context_length"].astype(str).tolist()}
    rows = [row.to_dict() for _, row in table.iterrows()]
    columns["Configuration"] = [str(row["configuration"]) for row in rows]
    columns["Seeds"] = [
        f"{row['seeds'] - row['diverged']} of {row['seeds']}" if row["diverged"] else str(row["seeds"]) for row in rows
    ]
    columns["Loss, nats"] = [number(row[EVAL_LOSS], ".3f") for row in rows]
    columns["Perplexity"] = [_plus_minus(row, EVAL_PPL, _perplexity_format(row[EVAL_PPL])) for row in rows]
    columns["Δ ppl, %"] = [_plus_minus(row, DELTA_PERCENT, "+.1f") for row in rows]
    columns["Δ loss, nats"] = [
        _plus_minus(row, "loss_difference", "+.3f") + (" †" if row["loss_difference_over"] == "sequences" else "")
        for row in rows
    ]
    for band, label in zip(BANDS, BAND_LABELS, strict=True):
        columns[label] = [number(100 * row[band], ".1f") for row in rows]
    if table["published_ppl"].notna().any():
        columns["Published (Δ %)"] = [
            _DASH
            if np.isnan(row["published_ppl"])
            else f"{number(row['published_ppl'], '.3f')} ({number(row['published_delta_percent'], '+.1f')})"
            for row in rows
        ]
    return pd.DataFrame(columns)


def column_groups(table: pd.DataFrame) -> dict[str, list[str]]:
    """Common heads of the columns of ``formatted(table)``: what is taken to the baseline, and the bands."""
    baselines = in_order(table.loc[table["loss_difference_over"] == "baseline", "configuration"])
    to_baseline = f"Against {baselines[0]}" if len(baselines) == 1 else "Against the baseline"
    return {to_baseline: ["Δ ppl, %", "Δ loss, nats"], "Heads by entropy band, %": list(BAND_LABELS)}


def _perplexity_format(perplexity: float) -> str:
    return ".3f" if perplexity < 10 else ".2f" if perplexity < 100 else ".1f"


def _plus_minus(row: dict[Any, Any], name: str, form: str) -> str:
    return plus_minus(Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], row["seeds"]), form)


def table_notes(table: pd.DataFrame) -> list[str]:
    """What a reader has to know to read the numbers of ``formatted(table)``, one sentence each."""
    notes = []
    if (table["seeds"] > 1).any():
        notes.append("± is half of a 95 % t-interval over seeds.")
    if (table["loss_difference_over"] == "sequences").any():
        notes.append("† One seed: the interval covers evaluation sampling only, not the spread between seeds.")
    if table["diverged"].any():
        notes.append("Seeds “n of m”: n of m runs finished; the others diverged and are not left out of the means.")
    notes.append("Bands: share of heads, %; max is the largest entropy over the heads of all configurations.")
    if table["published_ppl"].notna().any():
        notes.append("Published numbers come from the paper, at its own scale; they were not measured here.")
    return notes


def to_console(table: pd.DataFrame) -> Table:
    """The table for a terminal of 100 columns, folded where there is less.

    The four bands share one column, rounded to whole percent; the paired loss difference is left to the report.
    """
    shown = formatted(table)
    console = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text("\n".join(note for note in table_notes(table) if not note.startswith("†"))),
    )
    console.caption_justify = "left"
    if "Model" not in shown:
        console.title = Text(f"{table['model'].iloc[0]}, T = {table['context_length'].iloc[0]}")
    bands = [[f"{100 * row[band]:.0f}" for band in BANDS] for _, row in table.iterrows()]
    columns: dict[str, list[str]] = {}
    for column in map(str, shown.columns):
        if column not in (*BAND_LABELS, "Δ loss, nats"):
            columns[column] = shown[column].tolist()
        elif column == BAND_LABELS[0]:
            columns["Bands, %"] = [
                "NaN" if "nan" in shares else " ".join(f"{s:>2}" for s in shares) for shares in bands
            ]
    for column in columns:
        console.add_column(Text(column), justify="left" if column in _LABELS else "right", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        console.add_row(*(Text(cell) for cell in row))
    return console


def to_markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown, with its notes beneath; ends with a newline."""
    shown = formatted(table)
    lines = [
        _markdown_row([str(column) for column in shown.columns]),
        _markdown_row([":---" if column in _LABELS else "---:" for column in shown.columns]),
        *(_markdown_row([str(cell) for cell in row]) for row in shown.itertuples(index=False)),
        "",
        *(f"- {note}" for note in table_notes(table)),
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (html.escape(cell, quote=False).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"
