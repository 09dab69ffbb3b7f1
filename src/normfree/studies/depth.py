"""How one or several models use their depth: figures and one page, for finished models and for studies."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from normfree.interpret import DepthMeasurement, write_depth
from normfree.interpret.depth.variance import WITHOUT_FIRST
from normfree.report import (
    Block,
    Callout,
    Section,
    Table,
    angular_distance_heatmaps,
    jacobian_distance_and_gradient_norms,
    render_report,
    residual_variance_over_depth,
    skipped_layer_losses,
    weights_entry,
    write_report,
)
from normfree.runner import FIGURES_FOLDER, saved_figure

_NAMES = {
    "n_layer": "Layers",
    "loss_nats": "Loss, nats",
    "effective_depth": "Effective depth",
    "effective_depth_standard_error": "± (s.e.)",
    "effective_depth_share": "of layers",
    "useful_layers": "Useful layers",
    "deep_half_share": "Deep half's share",
    "deep_layer_nats": "Deep layer, nats",
    "variance_growth": "Variance grows",
    "variance_ratio": "Last over first",
    "nonfinite_entries": "Not finite",
}


MOST_RUNS_IN_FULL = 4
"""Of more runs the laws of growth have no table: it has four rows a run."""


def write_depth_page(
    found: Mapping[str, DepthMeasurement],
    folder: Path,
    command: str,
    *,
    sequences: str,
    quantized: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Writes what was measured of each model, by name, into ``folder``: CSV files, figures, ``report.html``.

    The page names the ``sequences`` that the models read, and how weights were ``quantized``, by model.

    Returns:
        The summary, a row a model (see :func:`normfree.interpret.measure_depth`).
    """
    written = _together([each.frames(model=name) for name, each in found.items()])
    write_depth(written, folder)
    table = written["summary"]
    frames = _together([each.frames(configuration=name, seed=0) for name, each in found.items()])
    shown = table[["model", *_NAMES]].rename(columns={"model": "Model", **_NAMES})
    formats = {"Loss, nats": ".3f", "Effective depth": ".2f", "± (s.e.)": ".2f", "of layers": ".0%"}
    formats |= {"Useful layers": ".0f", "Deep half's share": ".1%", "Deep layer, nats": ".4f", "Last over first": ".3g"}
    result = Table(
        shown,
        "One row a model.",
        formats=formats,
        notes=[
            "Effective depth: participation ratio of what the loss gains when each layer alone is skipped; standard "
            "error over sequences. Useful layers: those that cost at least 1 % of what the costliest does.",
            "Deep half's share: of all increases of the loss, that of the deeper half of the layers. Deep layer: mean "
            "increase when a single one of them is skipped.",
            "Variance grows: best law for the variance of the residual stream after each block, all tokens but the "
            "first of a sequence; last over first: its quotient. Not finite: NaN and infinite entries of it.",
        ],
    )
    blocks: list[Block] = [result, *_warnings(table)]
    page = render_report(
        title="How depth is used: " + ", ".join(found),
        lead=" ".join(_sentence(row) for _, row in table.iterrows()),
        sections=[Section("Result", blocks), *depth_sections(frames, folder / FIGURES_FOLDER)],
        meta={
            "Made by": f"normfree {version('normfree')}",
            "Date": date.today().isoformat(),
            "Command": command,
            "Read on": sequences,
            **weights_entry(quantized),
        },
    )
    write_report(folder / "report.html", page)
    return table


def depth_sections(frames: Mapping[str, pd.DataFrame], folder: Path) -> list[Section]:
    """The sections of a page, their figures saved in ``folder``.

    Args:
        frames: those of :meth:`~normfree.interpret.DepthMeasurement.frames`, of one or several runs, that configuration
            and seed name.
        folder: made if need be.
    """
    growth = frames["variance_growth"]
    runs = growth[["configuration", "seed"]].drop_duplicates()
    is_short = len(runs) <= MOST_RUNS_IN_FULL and runs["configuration"].is_unique
    laws = growth[growth["tokens"] == WITHOUT_FIRST] if is_short else None
    return [
        Section(
            "Residual stream variance",
            [
                saved_figure(
                    folder,
                    "residual-variance",
                    residual_variance_over_depth(frames["residual_variance"], growth),
                    "Variance of the residual stream by layer: over channels, mean over tokens and sequences. Dashed: "
                    "the law that describes its logarithm best.",
                ),
                *([] if laws is None else [_growth_table(laws)]),
            ],
        ),
        Section(
            "Layers left out",
            [
                saved_figure(
                    folder,
                    "skipped-layers",
                    skipped_layer_losses(frames["skipped_layers"], frames["dropped_last"]),
                    "Loss without layers: increase over the plain loss when a block is the identity, on the same "
                    "sequences.",
                )
            ],
        ),
        Section(
            "Angular distance",
            [
                saved_figure(
                    folder,
                    "angular-distance",
                    angular_distance_heatmaps(frames["angular_distance"]),
                    "Angular distance of the residual stream n blocks apart: arccos of the cosine, over π, at the last "
                    "token of a sequence.",
                )
            ],
        ),
        Section(
            "Jacobians and gradients",
            [
                saved_figure(
                    folder,
                    "jacobian-and-gradients",
                    jacobian_distance_and_gradient_norms(frames["jacobian_distance"], frames["gradient_norms"]),
                    "Distance of each block's Jacobian from the identity, and gradient norms of the loss: 0 is a block "
                    "that does nothing, and 1 one whose output does not depend on its input. What is below 10⁻⁴ of a "
                    "panel's largest value is not shown.",
                )
            ],
        ),
    ]


def _together(measurements: list[dict[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    return {name: pd.concat([each[name] for each in measurements], ignore_index=True) for name in measurements[0]}


def _growth_table(growth: pd.DataFrame) -> Table:
    shown = pd.DataFrame(
        {
            "Model": growth["configuration"],
            "Law": growth["law"],
            "a": _with_interval(growth, "scale"),
            "b": _with_interval(growth, "rate"),
            "Residual s.d.": growth["log_std"],
            "ΔAICc": growth["delta_aicc"],
            "Akaike weight": growth["akaike_weight"],
        }
    )
    return Table(
        shown,
        "Laws of growth of the variance after l blocks, l from 1, best first; all tokens but the first.",
        formats={"Residual s.d.": ".3f", "ΔAICc": ".1f", "Akaike weight": ".3f"},
        notes=[
            "constant a; linear a + b l; power law a l^b; exponential a exp(b l): least squares on log variance, "
            "with 95 % intervals. A law less than 2 behind in AICc describes the variance as well.",
        ],
    )


def _with_interval(growth: pd.DataFrame, name: str) -> list[str]:
    return [
        "–" if np.isnan(value) else f"{value:.3g} [{low:.3g}, {high:.3g}]"
        for value, low, high in zip(growth[name], growth[f"{name}_low"], growth[f"{name}_high"], strict=True)
    ]


def _warnings(table: pd.DataFrame) -> list[Block]:
    blocks: list[Block] = [
        Callout(
            f"The residual stream of {row['model']} holds {row['nonfinite_entries']:,} entries that are NaN or "
            "infinite; what they enter is not finite either.",
            kind="warning",
        )
        for _, row in table[table["nonfinite_entries"] > 0].iterrows()
    ]
    others = table.loc[~table["variance_growth_is_distinct"], "model"]
    if len(others):
        blocks.append(Callout(f"No law of growth is clearly the best (ΔAICc of 2 or more) for {', '.join(others)}."))
    return blocks


def _sentence(row: pd.Series) -> str:
    """The summary of one model in words that hold whatever the numbers are."""
    if not np.isfinite(row["effective_depth"]):
        return f"{row['model']}: the loss is not finite with all layers or without one of them; no effective depth."
    share = row["deep_half_share"]
    deep = "no layer costs anything" if np.isnan(share) else f"the deeper half has {100 * share:.0f} % of it"
    return (
        f"{row['model']} loses by single skipped layers as if {row['effective_depth']:.1f} of its {row['n_layer']} "
        f"layers mattered alike; {deep}."
    )
