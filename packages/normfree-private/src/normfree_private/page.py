"""The page of ``normfree private-cost``: tables, figures, formulas, and what the protocols assume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from normfree.files import write_text
from normfree.report import (
    FIGURES_FOLDER,
    Callout,
    Code,
    Element,
    Paragraph,
    Section,
    Table,
    render_report,
    saved_figure,
    weights_entry,
    write_report,
)
from normfree_private.costs import PrivateCosts
from normfree_private.figures import alternatives_bytes, cost_by_operation, perplexity_against_bytes
from normfree_private.operations import GROUPS
from normfree_private.pricing import group_costs
from normfree_private.projection import Network

_MEGABYTE = 1e6
_FORMULA = "network seconds = messages · one-way delay + 8 · bytes / bandwidth          (both of one party)"


def write_page(costs: PrivateCosts, folder: Path, *, command: str) -> Path:
    """Writes CSV files, figures and ``report.html`` into ``folder``; returns the path of the report.

    The page names ``command``, and says how weights were quantized.
    """
    for name, frame in costs.frames().items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False, na_rep="nan"))
    first = costs.settings[0]
    page = render_report(
        title="What encryption costs: " + ", ".join(dict.fromkeys(costs.totals["model"])),
        lead=_lead(costs.totals),
        sections=_sections(costs, folder / FIGURES_FOLDER),
        meta={
            "Made by": f"normfree {version('normfree')}",
            "Engine": f"SecretFlow SPU {costs.engine_version}, {first.field.upper()}, {first.fraction_bits} fraction "
            "bits",
            "Sequence length": ", ".join(str(each) for each in dict.fromkeys(costs.sequence_lengths)),
            "Date": date.today().isoformat(),
            "Command": command,
            **weights_entry(costs.quantization),
        },
    )
    report = folder / "report.html"
    write_report(report, page)
    return report


def _sections(costs: PrivateCosts, figures: Path) -> list[Section]:
    assumptions = [f"{each.protocol.name}: {each.protocol.assumption}." for each in costs.settings]
    projections = [f"{network}." for network in costs.networks]
    result = [
        _totals_table(costs.totals, costs.networks, assumptions + projections),
        _shares_table(costs.totals, costs.networks),
        saved_figure(
            figures,
            "private-operations",
            cost_by_operation(group_costs(costs.operations)),
            "Megabytes and messages that a party sends, by operation, mean over the parties.",
        ),
        *_pareto(costs.totals, figures),
    ]
    found = [Section("Result", result), Section("Operations", [_operations_table(costs.operations)])]
    if costs.alternatives is not None:
        figure = saved_figure(
            figures,
            "private-alternatives",
            alternatives_bytes(costs.alternatives),
            "Megabytes that a party sends for each norm and each activation on the arrays of the first model, "
            "whichever it has.",
        )
        table = _alternatives_table(costs.alternatives)
        found.append(Section("What each norm and activation would cost", [figure, table]))
    checks = [_blocks_table(costs.blocks), *_end_to_end(costs.end_to_end)]
    return [*found, Section("Checks", checks), Section("How to read it", _HOW_TO_READ)]


_HOW_TO_READ: list[Element] = [
    Code(_FORMULA),
    Callout(
        "Bytes and messages are exact: they repeat from run to run. Seconds over loopback are the median of a few runs "
        "on the machine that measured, all parties on it; they tell nothing about a network."
    ),
    Paragraph(
        "Sharing the weights and the input among the parties, and opening the result, is not counted. The input is the "
        "one-hot rows of the tokens, which their owner makes."
    ),
]
_WHOSE = {"model": "Model", "protocol": "Protocol", "part": "Part"}


def _totals_table(totals: pd.DataFrame, networks: Sequence[Network], notes: Sequence[str]) -> Table:
    columns = {**_WHOSE, "bytes_sent": "MB", "messages_sent": "Messages"}
    columns |= {f"{network.name}_seconds": f"{network.name}, s" for network in networks}
    columns |= {"seconds": "Loopback, s"}
    frame = totals.assign(bytes_sent=totals["bytes_sent"] / _MEGABYTE)[list(columns)].rename(columns=columns)
    if totals["eval_ppl"].notna().any():
        # A configuration without a trained model has none.
        frame["Perplexity"] = ["–" if math.isnan(value) else f"{value:.1f}" for value in totals["eval_ppl"]]
    formats = {"MB": ",.1f", "Messages": ",.0f", "Loopback, s": ",.2f"}
    formats |= {f"{network.name}, s": ",.1f" for network in networks}
    return Table(frame, "Sent by a party, mean over the parties.", formats, notes)


def _shares_table(totals: pd.DataFrame, networks: Sequence[Network]) -> Table:
    shares = {f"{group}_percent": f"{group.capitalize()}, %" for group in GROUPS if f"{group}_percent" in totals}
    if "norm_percent" in shares:
        shares["norm_messages_sent_percent"] = "Norm, % of messages"
        shares |= {f"norm_{network.name}_seconds_percent": f"Norm, % of {network.name}" for network in networks}
    columns = {**_WHOSE, **shares}
    unbroken = totals.assign(part=totals["part"].str.replace(" ", "\N{NO-BREAK SPACE}"))
    return Table(
        unbroken[list(columns)].rename(columns=columns),
        "Who sends it: shares of the bytes, where nothing else is said.",
        dict.fromkeys(shares.values(), ".1f"),
    )


def _operations_table(operations: pd.DataFrame) -> Table:
    """Block 0 and the parts outside the blocks; equal rows of several models once, with all their names."""
    shown = operations[operations["layer"].isna() | (operations["layer"] == 0)]
    where = shown["layer"].map(lambda layer: "model" if pd.isna(layer) else "block 0")
    key = ["protocol", "part", "name", "operation", "shapes"]
    frame = (
        shown.assign(part=where)
        .groupby(key, sort=False, as_index=False)
        .agg(
            models=("model", lambda names: ", ".join(dict.fromkeys(names))),
            bytes_sent=("bytes_sent", "first"),
            messages_sent=("messages_sent", "first"),
            seconds=("seconds", "first"),
        )
    )
    return _cost_table(frame, ["name", "operation", "shapes", "part", "protocol", "models"], "Every operation once.")


def _alternatives_table(alternatives: pd.DataFrame) -> Table:
    return _cost_table(alternatives, ["label", "shapes", "protocol"], "Norms and activations on the same arrays.")


def _cost_table(frame: pd.DataFrame, names: list[str], caption: str) -> Table:
    titles = {name: name.capitalize() for name in names}
    titles |= {"bytes_sent": "MB", "messages_sent": "Messages", "seconds": "Loopback, s"}
    shown = frame.assign(bytes_sent=frame["bytes_sent"] / _MEGABYTE)[list(titles)].rename(columns=titles)
    return Table(shown, caption, {"MB": ",.2f", "Messages": ",.0f", "Loopback, s": ",.3f"})


def _blocks_table(blocks: pd.DataFrame) -> Table:
    return Table(
        _against_sums(blocks),
        "Block 0 in one program, and the sum of its operations.",
        {"MB": ",.2f", "Sum, MB": ",.2f", "Messages": ",.0f", "Sum, messages": ",.0f", "Difference, %": "+.2f"},
    )


def _end_to_end(end_to_end: pd.DataFrame | None) -> list[Element]:
    if end_to_end is None:
        return []
    quality = {
        "max_error": "Largest error",
        "mean_error": "Mean error",
        "logit_std": "Std of logits",
        "same_prediction": "Same prediction, %",
        "plain_loss": "Loss, plain",
        "encrypted_loss": "Loss, encrypted",
    }
    frame = _against_sums(end_to_end)
    for name, title in quality.items():
        frame[title] = end_to_end[name] * (100 if name == "same_prediction" else 1)
    return [
        Table(
            frame,
            "Whole models under encryption, weights and tokens secret.",
            {"MB": ",.1f", "Sum, MB": ",.1f", "Messages": ",.0f", "Sum, messages": ",.0f", "Difference, %": "+.2f"},
            [
                "Errors are absolute differences of logits from the plain model's in float64, over all positions and "
                "the vocabulary, on random tokens; losses in nats."
            ],
        )
    ]


def _against_sums(frame: pd.DataFrame) -> pd.DataFrame:
    titles = {
        "model": "Model",
        "protocol": "Protocol",
        "bytes_sent": "MB",
        "sum_bytes_sent": "Sum, MB",
        "difference_percent": "Difference, %",
        "messages_sent": "Messages",
        "sum_messages_sent": "Sum, messages",
        "seconds": "Loopback, s",
    }
    scaled = frame.assign(**{name: frame[name] / _MEGABYTE for name in ("bytes_sent", "sum_bytes_sent")})
    return scaled[list(titles)].rename(columns=titles)


def _pareto(totals: pd.DataFrame, figures: Path) -> list[Element]:
    whole = totals[totals["part"] != "block 0"]
    if whole["eval_ppl"].notna().sum() < 2:
        return []
    return [
        saved_figure(
            figures,
            "private-pareto",
            perplexity_against_bytes(whole),
            "Perplexity against what a party sends. The dashed line joins the models that none beats in both.",
        )
    ]


def _lead(totals: pd.DataFrame) -> str:
    """Each model's cost, and the shares of its norms and activations, as sentences."""
    return " ".join(
        f"{row['model']} under {row['protocol']}: a party sends {row['bytes_sent'] / _MEGABYTE:,.1f} MB in "
        f"{row['messages_sent']:,.0f} messages, {row.get('norm_percent', 0.0):.1f} % of the bytes for norms and "
        f"{row['activation_percent']:.1f} % for activations."
        for row in totals[totals["part"] != "block 0"].to_dict("records")
    )
