"""The report of a study: what every study shows of its runs, and room for what it shows of its own."""

from __future__ import annotations

import datetime
import importlib.metadata
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from normfree.entropy import uniform_entropy_bound
from normfree.errors import InputError
from normfree.files import write_text
from normfree.report import (
    Block,
    Callout,
    Code,
    FigureBlock,
    KeyValues,
    Paragraph,
    Section,
    Table,
    formatted,
    headwise_entropy_heatmaps,
    load_published,
    perplexity_table,
    render_report,
    save_figure,
    table_notes,
    write_report,
)
from normfree.runner.execution import Execution, train_study
from normfree.runner.plan import LEARNING_RATE_FACTORS, SWEEP_DECAY
from normfree.runner.run_frames import head_entropy_frame, results_frame, sequence_losses_frame
from normfree.runner.study import STUDY_FILE, Study, StudyFolder, best_learning_rates
from normfree.training import RunResult
from normfree.training.configuration import read_yaml
from normfree.training.run_folder import RESULTS_FILE

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"


@dataclass(frozen=True)
class Findings:
    """What a study says beyond the table: a lead of a few sentences, sections, and how far its runs can speak."""

    lead: str
    sections: Sequence[Section]
    limits: str


@dataclass(frozen=True)
class StudyPage:
    """The finished runs of a study, and what its report is made from; ``figures`` is where in the folder these go."""

    study: Study
    folder: StudyFolder
    figures: str = FIGURES_FOLDER

    @cached_property
    def labels(self) -> list[str]:
        """The configurations' labels, in the study's order."""
        return [configuration.label for configuration in self.study.configurations(self.folder.preset)]

    @cached_property
    def results(self) -> list[RunResult]:
        """The finished runs at the recipe's learning rate, in the study's order.

        Raises:
            InputError: no run of the baseline is finished.
        """
        results = self._in_order(self.folder.results("runs"))
        if self.study.baseline not in {each.row["configuration"] for each in results}:
            raise InputError(
                f"{self.path} has no finished run of {self.study.baseline} yet; let `normfree study` go on"
            )
        return results

    @cached_property
    def tuned(self) -> list[RunResult]:
        """The runs at each configuration's own best learning rate; none before every trained configuration has one."""
        rates = best_learning_rates(self.folder)
        # Where the recipe's rate was the best one, its run is the tuned run.
        kept = [each for each in self.results if rates.get(each.row["configuration"]) == each.row["learning_rate"]]
        tuned = self._in_order([*kept, *self.folder.results("tuned")])
        trained, with_own = ({each.row["configuration"] for each in group} for group in (self.results, tuned))
        return tuned if with_own == trained else []

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table at the recipe's learning rate (see :func:`normfree.report.perplexity_table`)."""
        return self._table(self.results)

    @cached_property
    def tuned_table(self) -> pd.DataFrame | None:
        """The same, each configuration at its own best learning rate, if the sweep is done."""
        return self._table(self.tuned) if self.tuned else None

    @cached_property
    def runs(self) -> pd.DataFrame:
        """What ``results.csv`` holds: a row a finished run, of the recipe's learning rate and of the tuned ones."""
        frame = results_frame(self.study, self.labels, self.results).assign(learning_rate_source="recipe")
        if self.tuned:
            tuned = results_frame(self.study, self.labels, self.tuned).assign(learning_rate_source="tuned")
            frame = pd.concat([frame, tuned], ignore_index=True)
        return frame

    @property
    def path(self) -> Path:
        """The study's folder."""
        return self.folder.path

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """``table``, and ``tuned_table`` if the sweep is done."""
        return {"table": self.table} | ({} if self.tuned_table is None else {"tuned_table": self.tuned_table})

    @property
    def uniform_bound(self) -> float:
        """Entropy of uniform attention at the study's sequence length, in nats."""
        return uniform_entropy_bound(self.folder.preset.data.sequence_length)

    def run(self, execution: Execution) -> dict[str, str]:
        """Trains the study. See :func:`train_study`.

        Raises:
            InputError: a configuration, the recipe or the corpus cannot be used; then the folder is not touched.
        """
        return train_study(self.study, self.folder, execution)

    def figure(self, name: str, figure: Figure, caption: str) -> FigureBlock:
        """Saves ``figure`` in the study's folder, as PNG and PDF, and returns it for the page."""
        return saved_figure(self.path / self.figures, name, figure, caption)

    def write(self) -> Path:
        """Writes ``results.csv``, ``figures/`` and ``report.html``; returns the page's path.

        Raises:
            InputError: no run of the baseline is finished.
        """
        write_text(self.path / RESULTS_FILE, self.runs.to_csv(index=False, na_rep="nan"))

        findings = self.study.describe(self)
        sections = [self._result_section()]
        if self.tuned:
            sections.append(self._tuned_section())
        page = render_report(
            title=self.study.title,
            lead=findings.lead,
            sections=[*sections, *findings.sections, self._method_section(findings.limits)],
            meta={
                "Made by": f"normfree {importlib.metadata.version('normfree')}",
                "Date": datetime.date.today().isoformat(),
                "Preset": self.folder.preset_name,
            },
        )
        write_report(self.path / REPORT_FILE, page)
        return self.path / REPORT_FILE

    def _in_order(self, results: Sequence[RunResult]) -> list[RunResult]:
        known = [each for each in results if each.row["configuration"] in self.labels]
        return sorted(known, key=lambda each: (self.labels.index(each.row["configuration"]), each.row["seed"]))

    def _table(self, results: list[RunResult]) -> pd.DataFrame:
        return perplexity_table(
            results_frame(self.study, self.labels, results),
            head_entropy_frame(results),
            sequence_losses_frame(results),
            baseline=self.study.baseline,
            published=self._published(),
        )

    def _published(self) -> pd.DataFrame | None:
        column = self.folder.preset.published
        if column is None:
            return None
        table = load_published("relu_revival_table2")
        table = table[(table["model"] == column.model) & (table["context_length"] == column.context_length)]
        # The published Δ % are to one configuration; beside differences to another they would mislead.
        is_baseline = table["configuration"] == self.study.baseline
        return table if table.loc[is_baseline, "delta_percent"].eq(0).any() else None

    def _result_section(self) -> Section:
        rate = f"{self.folder.preset.recipe.learning_rate:g}"
        blocks: list[Block] = [
            _table_block(self.table, f"Evaluation loss and perplexity at the recipe's learning rate, {rate}.")
        ]
        if (self.table["diverged"] > 0).any():
            blocks.append(
                Callout(
                    "A diverged run has no perplexity. It is shown as NaN, and it is left out of no mean.", "warning"
                )
            )
        return Section("Result", blocks)

    def _tuned_section(self) -> Section:
        assert self.tuned_table is not None, "asked for only where the sweep is done"
        rates = best_learning_rates(self.folder)
        sweep = pd.DataFrame([result.row for result in self.folder.results("sweep")])
        losses = sweep.pivot_table(
            index="configuration", columns="learning_rate", values="eval_loss", sort=False, dropna=False
        )
        losses = losses.reindex(self.labels)[sorted(losses.columns)]
        losses.columns = [f"{rate:g}" for rate in losses.columns]
        grid = [factor * self.folder.preset.recipe.learning_rate for factor in LEARNING_RATE_FACTORS]
        at_the_edge = [label for label, rate in rates.items() if rate in (min(grid), max(grid))]
        blocks: list[Block] = [
            Paragraph(
                f"Is a configuration worse, or only less tolerant of the learning rate? Each was trained at "
                f"{len(grid)} rates, with the whole run's warm-up and a decay over {100 * SWEEP_DECAY:.0f} % of the "
                "budget, and for the whole budget at its best rate: "
                + ", ".join(f"{label} {rate:g}" for label, rate in rates.items())
                + "."
            ),
            _table_block(self.tuned_table, "The same table, each configuration at its own best rate."),
            Table(
                losses.reset_index(names="Configuration"),
                "The sweep: evaluation loss in nats by learning rate, one seed. NaN: diverged.",
                formats=dict.fromkeys(losses.columns, ".3f"),
            ),
            self.figure(
                "headwise-entropy-tuned",
                headwise_entropy_heatmaps(head_entropy_frame(self.tuned), maximum=self.uniform_bound),
                "Attention entropy of every head in nats, each configuration at its own best rate: final weights, "
                "evaluation tokens, one colour scale.",
            ),
        ]
        if at_the_edge:
            blocks.append(Callout(f"The best rate of {', '.join(at_the_edge)} is at the edge of the sweep.", "warning"))
        return Section("With tuned learning rates", blocks)

    def _method_section(self, limits: str) -> Section:
        preset = self.folder.preset
        row = self.results[0].row
        provenance = read_yaml(self.results[0].folder / "config.yaml")["provenance"]
        seeds = sorted({int(each.row["seed"]) for each in self.results})
        facts = {
            "Model": f"{preset.model_name}: {row['n_parameters']:,} parameters ({row['configuration']})",
            "Corpus": _corpus_facts(preset.data.corpus, provenance),
            "Training": f"{int(row['tokens']):,} tokens ({row['epochs']:.2f} epochs), {int(row['steps']):,} steps of "
            f"{preset.recipe.batch_size} sequences of {preset.data.sequence_length} tokens",
            "Evaluation": f"{int(row['eval_sequences']):,} sequences of files that no run was trained on",
            "Seeds": ", ".join(str(seed) for seed in seeds),
            "Precision": preset.recipe.precision,
            "Device": f"{provenance['device']}, {provenance['cpu_threads']} CPU threads",
            "Versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        }
        command = f"normfree study {shlex.quote(self.folder.reference)} --preset {self.folder.preset_name}"
        command += f" --seeds {','.join(map(str, seeds))}"
        if len(seeds) == 1:
            limits += " With one seed there is no estimate of the spread between seeds."
        return Section(
            "How it was made",
            [
                KeyValues(facts),
                Paragraph(
                    "Models of one shape start from the same weights, and all see the same batches in the same order."
                ),
                Code(command),
                Callout(limits, "warning"),
                Paragraph("The whole configuration:"),
                Code((self.path / STUDY_FILE).read_text(encoding="utf-8").rstrip()),
            ],
        )


def saved_figure(folder: Path, name: str, figure: Figure, caption: str) -> FigureBlock:
    """Saves ``figure`` in ``folder``, as PNG and PDF, and returns it for a page."""
    png = next(path for path in save_figure(figure, folder, name) if path.suffix == ".png")
    return FigureBlock(png.read_bytes(), alt=caption.split(":")[0], caption=caption)


def _corpus_facts(corpus: str, provenance: dict[str, Any]) -> str:
    statistics = provenance["corpus"]
    found, train, evaluation = statistics["corpus"], statistics["train"], statistics["eval"]
    reasons = ("duplicates", "undecodable", "binary", "too_large", "empty", "unreadable")
    skipped = ", ".join(f"{found[reason]:,} {reason.replace('_', ' ')}" for reason in reasons if found[reason])
    return (
        f"{corpus}: {found['documents']:,} documents, {found['bytes'] / 1e6:.0f} MB"
        f" (skipped: {skipped or 'none'});"
        f" {train['documents']:,} documents tokenized for training and {evaluation['documents']:,} for evaluation,"
        f" {evaluation['bytes_per_token']:.2f} bytes a token; fingerprint {provenance['corpus_fingerprint']}"
    )


def _table_block(table: pd.DataFrame, caption: str) -> Table:
    return Table(formatted(table), caption, notes=table_notes(table))
