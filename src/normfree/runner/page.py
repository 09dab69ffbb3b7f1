"""The finished runs of a study, for its ``describe``: results, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from normfree.columns import DELTA_PERCENT, EVAL_PPL, EVAL_PPL_HIGH, EVAL_PPL_LOW
from normfree.entropy import uniform_entropy_bound
from normfree.errors import InputError
from normfree.report import (
    BANDS,
    FIGURES_FOLDER,
    Callout,
    FigureElement,
    Section,
    load_published,
    perplexity_table,
    saved_figure,
)
from normfree.report.entropy_figures import headwise_entropy_heatmaps, layerwise_entropy_dynamics
from normfree.report.loss_curves import evaluation_loss_curves
from normfree.runner.run_frames import (
    eval_curve_frame,
    head_entropy_frame,
    layer_entropy_frame,
    results_frame,
    sequence_losses_frame,
)
from normfree.runner.study_folder import StudyFolder
from normfree.training import RunResult
from normfree.training.records import METRICS_FILE, read_parquet

COMPARABLE = "Perplexities are comparable only between rows of one table: another tokenizer or corpus changes them."
"""For the limits of a study's :class:`Findings`."""


@dataclass(frozen=True)
class Findings:
    """A study's part of the report: a lead of a few sentences, sections, and the limits of its runs."""

    lead: str
    sections: Sequence[Section]
    limits: str


@dataclass(frozen=True)
class StudyPage:
    """The finished runs of a study.

    baseline: label of the configuration that the others are compared with.
    labels: of the configurations, in the study's order; runs of others are left out.
    figures: where in the folder figures are saved.
    """

    folder: StudyFolder
    baseline: str
    labels: tuple[str, ...]
    figures: str = FIGURES_FOLDER

    @property
    def path(self) -> Path:
        """The study's folder."""
        return self.folder.path

    @property
    def uniform_bound(self) -> float:
        """Entropy of uniform attention at the study's sequence length, in nats."""
        return uniform_entropy_bound(self.folder.preset.data.sequence_length)

    @cached_property
    def results(self) -> list[RunResult]:
        """The finished runs at the recipe's learning rate, in the study's order.

        Raises:
            InputError: no run of the baseline is finished.
        """
        results = self._in_order(self.folder.results("runs"))
        if self.baseline not in {each.row["configuration"] for each in results}:
            raise InputError(f"{self.path} has no finished run of {self.baseline} yet; resume `normfree study`")
        return results

    @cached_property
    def tuned(self) -> list[RunResult]:
        """The runs at the best learning rate of each configuration that has one; none before the baseline has."""
        rates = self.folder.best_learning_rates()
        # Where the recipe's rate was the best one, its run is the tuned run.
        kept = [each for each in self.results if rates.get(each.row["configuration"]) == each.row["learning_rate"]]
        retrained = [each for each in self.folder.results("tuned") if each.row["configuration"] in rates]
        tuned = self._in_order([*kept, *retrained])
        return tuned if self.baseline in {each.row["configuration"] for each in tuned} else []

    @property
    def training_seconds(self) -> float:
        """Wall-clock seconds of training, all finished runs together."""
        runs = {each.folder: each for each in [*self.results, *self.tuned, *self.folder.results("sweep")]}
        return sum(_training_seconds(folder) for folder in runs)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table at the recipe's learning rate (see :func:`normfree.report.perplexity_table`)."""
        return self._table(self.results)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """``table``, and ``tuned_table`` (configurations at their own best learning rates) if the baseline has one."""
        return {"table": self.table} | ({"tuned_table": self._table(self.tuned)} if self.tuned else {})

    @cached_property
    def recipe_runs(self) -> pd.DataFrame:
        """The frame of :func:`~normfree.runner.run_frames.results_frame`: a row a run at the recipe's learning rate."""
        return results_frame(self.results, self.labels, self.baseline)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """What ``results.csv`` holds: a row a finished run, of the recipe's learning rate and of the tuned ones."""
        frames = [self.recipe_runs.assign(learning_rate_source="recipe")]
        if self.tuned:
            tuned = results_frame(self.tuned, self.labels, self.baseline)
            frames.append(tuned.assign(learning_rate_source="tuned"))
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def overload(self) -> dict[str, dict[str, Any]]:
        """By configuration: itself, eval_ppl, eval_ppl_low, eval_ppl_high, and top_band, the share of overloaded heads.

        As :func:`~normfree.report.overload.perplexity_and_overload` takes them.
        """
        columns = ["configuration", EVAL_PPL, EVAL_PPL_LOW, EVAL_PPL_HIGH, BANDS[-1]]
        rows = self.table[columns].rename(columns={BANDS[-1]: "top_band"}).to_dict("records")
        return {row["configuration"]: {str(name): value for name, value in row.items()} for row in rows}

    def share_of(self, tokens: float, whose: str) -> str:
        """How many of the ``tokens`` of a paper's training the runs saw, as a sentence; nothing if they saw more."""
        seen = self.results[0].row["tokens"]
        return f"These runs saw {100 * seen / tokens:.2g} % of {whose}. " if seen < tokens else ""

    def measured(self, file: str) -> tuple[list[RunResult], list[Section]]:
        """The runs in whose folder a measurement wrote ``file``, and a section that names the others, if any."""
        missing = [each for each in self.results if not (each.folder / file).exists()]
        names = ", ".join(f"{each.row['configuration']} seed {each.row['seed']}" for each in missing)
        told = (
            f"Not measured yet, or diverged: {names}. `normfree study {self.folder.study_name}` measures what it can."
        )
        sections = [Section("Missing", [Callout(told, "warning")])] if missing else []
        return [each for each in self.results if (each.folder / file).exists()], sections

    def figure(self, name: str, figure: Figure, caption: str) -> FigureElement:
        """Saves ``figure`` in the study's folder, as PNG and PDF, and returns it for the report."""
        return saved_figure(self.path / self.figures, name, figure, caption)

    def loss_figure(self, caption: str = "Evaluation loss over training.") -> FigureElement:
        """The figure ``evaluation-loss``: a curve for each configuration."""
        return self.figure("evaluation-loss", evaluation_loss_curves(eval_curve_frame(self.results)), caption)

    def head_entropy_figure(self, caption: str | None = None) -> FigureElement:
        """The figure ``headwise-entropy``: attention entropy of every head after training, a panel each configuration.

        ``caption`` continues what is measured and where; default: what the mark on the scale is.
        """
        heatmaps = headwise_entropy_heatmaps(head_entropy_frame(self.results), maximum=self.uniform_bound)
        mark = f"The mark on the scale is the entropy of uniform attention, {self.uniform_bound:.3f} nats."
        what = "Attention entropy of every head in nats: final weights, evaluation tokens, one colour scale."
        return self.figure("headwise-entropy", heatmaps, f"{what} {caption or mark}")

    def layer_entropy_figure(self, compared: str = "") -> FigureElement:
        """The figure ``layerwise-entropy``: entropy of each layer over training; ``compared`` ends the caption."""
        curves = layerwise_entropy_dynamics(layer_entropy_frame(self.results), bound=self.uniform_bound)
        caption = f"Entropy of each layer over training, mean over its heads, on training batches{compared}."
        return self.figure("layerwise-entropy", curves, caption)

    def _in_order(self, results: Sequence[RunResult]) -> list[RunResult]:
        known = [each for each in results if each.row["configuration"] in self.labels]
        return sorted(known, key=lambda each: (self.labels.index(each.row["configuration"]), each.row["seed"]))

    def _table(self, results: list[RunResult]) -> pd.DataFrame:
        return perplexity_table(
            results_frame(results, self.labels, self.baseline),
            head_entropy_frame(results),
            sequence_losses_frame(results),
            baseline=self.baseline,
            published=self._published(),
        )

    def _published(self) -> pd.DataFrame | None:
        column = self.folder.preset.published
        if column is None:
            return None
        table = load_published("relu_revival_table2")
        table = table[(table["model"] == column.model) & (table["context_length"] == column.context_length)]
        # The published Δ % refer to one configuration; next to differences from another they would mislead.
        is_baseline = table["configuration"] == self.baseline
        return table if table.loc[is_baseline, DELTA_PERCENT].eq(0).any() else None


def _training_seconds(run: Path) -> float:
    return float(read_parquet(run / METRICS_FILE)["wall_seconds"].max())
