"""``normfree depth``: how one or several models use their depth, as figures and a page; studies share the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Unpack

import numpy as np
import pandas as pd

from normfree.columns import LOSS_NATS
from normfree.interpret.depth.figures import (
    angular_distance_heatmaps,
    jacobian_distance_and_gradient_norms,
    residual_variance_over_depth,
    skipped_layer_losses,
)
from normfree.interpret.depth.measurement import DepthMeasurement, measure_depth, write_depth
from normfree.interpret.depth.variance import WITHOUT_FIRST
from normfree.interpret.sequences import ComparedModels, SequenceOptions, TokenSequences
from normfree.progress import stage
from normfree.report import (
    FIGURES_FOLDER,
    Callout,
    Element,
    Section,
    Table,
    figure_section,
    weights_entry,
    write_page,
)

_COLUMNS = {
    "model": ("Model", None),
    "n_layer": ("Layers", None),
    LOSS_NATS: ("Loss, nats", ".3f"),
    "effective_depth": ("Effective depth", ".2f"),
    "effective_depth_standard_error": ("± (s.e.)", ".2f"),
    "effective_depth_share": ("of layers", ".0%"),
    "useful_layers": ("Useful layers", ".0f"),
    "deep_half_share": ("Deep half's share", ".1%"),
    "deep_layer_nats": ("Deep layer, nats", ".4f"),
    "variance_growth": ("Variance grows", None),
    "variance_ratio": ("Last over first", ".3g"),
    "nonfinite_entries": ("Not finite", None),
}
"""Columns of the summary: their headings and formats."""
_NOTES = (
    "Effective depth: participation ratio of the loss increases when each layer alone is skipped; standard error over "
    "sequences. Useful layers: those that cost at least 1 % of the costliest.",
    "Deep half's share: of all increases of the loss, that of the deeper half of the layers. Deep layer: mean increase "
    "when a single one of them is skipped.",
    "Variance grows: best law for the variance of the residual stream after each block, all tokens but the first of a "
    "sequence; last over first: its ratio. Not finite: its NaN and infinite entries.",
)
MOST_RUNS_IN_FULL = 4
"""Most runs with a table of the laws of growth, which has four rows a run."""


@dataclass(frozen=True)
class DepthComparison:
    """The result of :func:`compare_depth`.

    models: the measurement of each model, by its name.
    sequences: those that all models read.
    quantization: how weights were quantized, by model; models without are left out.
    loaded_as: device, dtype and, of a model from the Hub, commit, by model.
    """

    models: Mapping[str, DepthMeasurement]
    sequences: TokenSequences
    quantization: Mapping[str, str]
    loaded_as: Mapping[str, Mapping[str, str]]

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames of all measurements by name, with the column ``model`` first."""
        return _together([each.frames(model=name) for name, each in self.models.items()])

    @property
    def summary(self) -> pd.DataFrame:
        """One row a model (see :func:`normfree.interpret.measure_depth`)."""
        return self.frames["summary"]

    def write(self, folder: Path, command: str) -> None:
        """Writes CSV files, figures and ``report.html``, which quotes ``command``, into ``folder``, made if missing."""
        write_depth(self.frames, folder)
        of_runs = _together([each.frames(configuration=name, seed=0) for name, each in self.models.items()])
        shown = self.summary[list(_COLUMNS)].set_axis([heading for heading, _ in _COLUMNS.values()], axis=1)
        formats = {heading: how for heading, how in _COLUMNS.values() if how is not None}
        table = Table(shown, "One row a model.", formats=formats, notes=_NOTES)
        write_page(
            folder / "report.html",
            title="How depth is used: " + ", ".join(self.models),
            lead=" ".join(_sentence(row) for _, row in self.summary.iterrows()),
            sections=[
                Section("Result", [table, *_warnings(self.summary)]),
                *depth_sections(of_runs, folder / FIGURES_FOLDER),
            ],
            meta={
                "Command": command,
                "Read on": str(self.sequences),
                **weights_entry(self.quantization, self.loaded_as),
            },
        )


def compare_depth(
    models: Sequence[str] | Mapping[str, str],
    *,
    n_probe: int = 8,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    **sequences: Unpack[SequenceOptions],
) -> DepthComparison:
    """Measures each of ``models`` with :func:`measure_depth` on the same sequences, one model in memory at a time.

    Args:
        models: Hub ids, model folders, GGUF files or runs; or a mapping from names to these.
        n_probe: random vectors a sequence for each Jacobian.
        batch_size: sequences in memory at once.
        device, dtype: as for :func:`~normfree.training.load_pretrained`.
        sequences: as for :func:`~normfree.interpret.token_sequences`, for the first model.

    Raises:
        InputError: a model cannot be loaded or read, or is named twice, the models have different vocabularies, or the
            sequences do not fit.
    """
    compared = ComparedModels.of(models, 32, sequences, device=device, dtype=dtype)
    read = compared.sequences
    options = {"n_probe": n_probe, "batch_size": batch_size, "n_beginning": len(read.beginning)}
    found = {}
    for name, each in compared:
        with stage(f"depth of {name} on {read}"):
            found[name] = measure_depth(each.model, read.tokens, **options)
    return DepthComparison(found, read, compared.quantization, compared.loaded_as)


def depth_sections(frames: Mapping[str, pd.DataFrame], folder: Path) -> list[Section]:
    """The sections of a page, their figures saved in ``folder``, created if missing.

    Args:
        frames: :meth:`~normfree.interpret.DepthMeasurement.frames` of one or several runs, with columns configuration
            and seed.
        folder: of the figures.
    """
    growth = frames["variance_growth"]
    runs = growth[["configuration", "seed"]].drop_duplicates()
    is_short = len(runs) <= MOST_RUNS_IN_FULL and runs["configuration"].is_unique
    return [
        figure_section(
            "Residual stream variance",
            folder,
            "residual-variance",
            residual_variance_over_depth(frames["residual_variance"], growth),
            "Variance of the residual stream by layer: over channels, mean over tokens and sequences. Dashed: the law "
            "that describes its logarithm best.",
            *(_growth_blocks(growth[growth["tokens"] == WITHOUT_FIRST]) if is_short else []),
        ),
        figure_section(
            "Layers left out",
            folder,
            "skipped-layers",
            skipped_layer_losses(frames["skipped_layers"], frames["dropped_last"]),
            "Loss without layers: increase over the plain loss when a block is the identity, on the same sequences.",
        ),
        figure_section(
            "Angular distance",
            folder,
            "angular-distance",
            angular_distance_heatmaps(frames["angular_distance"]),
            "Angular distance of the residual stream n blocks apart: arccos of the cosine, over π, at the last token "
            "of a sequence.",
        ),
        figure_section(
            "Jacobians and gradients",
            folder,
            "jacobian-and-gradients",
            jacobian_distance_and_gradient_norms(frames["jacobian_distance"], frames["gradient_norms"]),
            "Distance of each block's Jacobian from the identity (0: the block does nothing; 1: its output does not "
            "depend on its input), and gradient norms of the loss. Values below 10⁻⁴ of a panel's largest are hidden.",
        ),
    ]


def _together(measurements: list[dict[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    return {name: pd.concat([each[name] for each in measurements], ignore_index=True) for name in measurements[0]}


def _growth_blocks(growth: pd.DataFrame) -> list[Element]:
    """The table of the laws of growth, and the models that have none."""
    is_fitted = growth.groupby("configuration", sort=False)["aicc"].transform("count") > 0
    missing = dict.fromkeys(growth.loc[~is_fitted, "configuration"])
    why = f"No law of growth for {', '.join(missing)}: a fit needs five layers, and variances that are finite."
    return [*([_growth_table(growth[is_fitted])] if is_fitted.any() else []), *([Callout(why)] if missing else [])]


def _growth_table(growth: pd.DataFrame) -> Table:
    columns = {
        "Model": growth["configuration"],
        "Law": growth["law"],
        "a": _with_interval(growth, "scale"),
        "b": _with_interval(growth, "rate"),
        "Residual s.d.": growth["log_std"],
        "ΔAICc": growth["delta_aicc"],
        "Akaike weight": growth["akaike_weight"],
    }
    return Table(
        pd.DataFrame(columns),
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


def _warnings(table: pd.DataFrame) -> list[Element]:
    blocks: list[Element] = [
        Callout(
            f"The residual stream of {row['model']} holds {row['nonfinite_entries']:,} NaN or infinite entries; the "
            "statistics that include them are not finite.",
            kind="warning",
        )
        for _, row in table[table["nonfinite_entries"] > 0].iterrows()
    ]
    others = table.loc[~table["variance_growth_is_distinct"], "model"]
    if len(others):
        blocks.append(Callout(f"No law of growth is clearly the best (ΔAICc of 2 or more) for {', '.join(others)}."))
    return blocks


def _sentence(row: pd.Series) -> str:
    """The summary of one model in words that hold for any numbers."""
    if not np.isfinite(row["effective_depth"]):
        return f"{row['model']}: the loss is not finite with all layers or without one of them; no effective depth."
    share = row["deep_half_share"]
    deep = (
        "no layer costs anything"
        if np.isnan(share)
        else f"the deeper half carries {100 * share:.0f} % of the loss increase"
    )
    return f"{row['model']}: effective depth {row['effective_depth']:.1f} of {row['n_layer']} layers; {deep}."
