"""How one or several models use their depth: figures and one page, for finished models and for studies."""

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
from normfree.interpret.sequences import (
    SequenceOptions,
    TokenSequences,
    check_same_tokens,
    named_sources,
    token_sequences,
)
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
from normfree.training import load_pretrained

_NAMES = {
    "n_layer": "Layers",
    LOSS_NATS: "Loss, nats",
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
_FORMATS = {
    "Loss, nats": ".3f",
    "Effective depth": ".2f",
    "± (s.e.)": ".2f",
    "of layers": ".0%",
    "Useful layers": ".0f",
    "Deep half's share": ".1%",
    "Deep layer, nats": ".4f",
    "Last over first": ".3g",
}
_NOTES = (
    "Effective depth: participation ratio of what the loss gains when each layer alone is skipped; standard error over "
    "sequences. Useful layers: those that cost at least 1 % of what the costliest does.",
    "Deep half's share: of all increases of the loss, that of the deeper half of the layers. Deep layer: mean increase "
    "when a single one of them is skipped.",
    "Variance grows: best law for the variance of the residual stream after each block, all tokens but the first of a "
    "sequence; last over first: its quotient. Not finite: NaN and infinite entries of it.",
)
MOST_RUNS_IN_FULL = 4
"""Of more runs the laws of growth have no table: it has four rows a run."""


@dataclass(frozen=True)
class DepthComparison:
    """What :func:`compare_depth` found.

    models: the measurement of each model, by its name.
    sequences: what all models read.
    quantization: how weights were quantized, by model; without models whose weights were not.
    """

    models: Mapping[str, DepthMeasurement]
    sequences: TokenSequences
    quantization: Mapping[str, str]

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames of all measurements by name, with the column ``model`` first."""
        return _together([each.frames(model=name) for name, each in self.models.items()])

    @property
    def summary(self) -> pd.DataFrame:
        """One row a model (see :func:`normfree.interpret.measure_depth`)."""
        return self.frames["summary"]

    def write(self, folder: Path, command: str) -> None:
        """Writes CSV files, figures and ``report.html``, which names ``command``, into ``folder``, creating it."""
        write_depth(self.frames, folder)
        of_runs = _together([each.frames(configuration=name, seed=0) for name, each in self.models.items()])
        shown = self.summary[["model", *_NAMES]].rename(columns={"model": "Model", **_NAMES})
        table = Table(shown, "One row a model.", formats=_FORMATS, notes=_NOTES)
        write_page(
            folder / "report.html",
            title="How depth is used: " + ", ".join(self.models),
            lead=" ".join(_sentence(row) for _, row in self.summary.iterrows()),
            sections=[
                Section("Result", [table, *_warnings(self.summary)]),
                *depth_sections(of_runs, folder / FIGURES_FOLDER),
            ],
            meta={"Command": command, "Read on": str(self.sequences), **weights_entry(self.quantization)},
        )


def compare_depth(
    models: Sequence[str] | Mapping[str, str],
    *,
    n_probe: int = 8,
    batch_size: int = 8,
    **sequences: Unpack[SequenceOptions],
) -> DepthComparison:
    """Measures each of ``models`` with :func:`measure_depth` on the same sequences; what ``normfree depth`` does.

    One model at a time is in memory.

    Args:
        models: Hub ids, model folders, GGUF files or runs; or these by the names to give them.
        n_probe: random vectors a sequence for each Jacobian.
        batch_size: sequences in memory at once.
        sequences: as for :func:`~normfree.interpret.token_sequences`, for the first model.

    Raises:
        InputError: a model cannot be loaded or read, or is named twice, the models have different vocabularies, or the
            sequences do not fit.
    """
    sources = named_sources(models)
    measured = load_pretrained(next(iter(sources.values())))
    first = measured.checkpoint
    read = token_sequences(measured, **sequences)
    found, quantization = {}, {}
    for name, source in sources.items():
        if measured.source != source:
            measured = load_pretrained(source)
            check_same_tokens(first, measured.checkpoint)
        if measured.quantization is not None:
            quantization[name] = measured.quantization
        with stage(f"depth of {name} on {read}"):
            options = {"n_probe": n_probe, "batch_size": batch_size, "n_beginning": len(read.beginning)}
            found[name] = measure_depth(measured.model, read.tokens, **options)
    return DepthComparison(found, read, quantization)


def depth_sections(frames: Mapping[str, pd.DataFrame], folder: Path) -> list[Section]:
    """The sections of a page, their figures saved in ``folder``.

    Args:
        frames: those of :meth:`~normfree.interpret.DepthMeasurement.frames`, of one or several runs, that configuration
            and seed name.
        folder: created if it is missing.
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
            *([_growth_table(growth[growth["tokens"] == WITHOUT_FIRST])] if is_short else []),
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
            "Distance of each block's Jacobian from the identity, and gradient norms of the loss: 0 is a block that "
            "does nothing, and 1 one whose output does not depend on its input. What is below 10⁻⁴ of a panel's "
            "largest value is not shown.",
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


def _warnings(table: pd.DataFrame) -> list[Element]:
    blocks: list[Element] = [
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
