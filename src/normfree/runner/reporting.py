"""The reports of studies and collections: what every one shows of its runs, and room for what it shows of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from normfree.columns import EVAL_LOSS
from normfree.files import write_text
from normfree.progress import duration
from normfree.report import (
    Callout,
    Code,
    Element,
    FigureElement,
    KeyValues,
    Paragraph,
    Section,
    Table,
    column_groups,
    formatted,
    table_notes,
    write_page,
)
from normfree.report.entropy_figures import headwise_entropy_heatmaps
from normfree.report.frames import in_order
from normfree.report.glossary import glossary
from normfree.report.numbers import counted
from normfree.runner.page import StudyPage
from normfree.runner.run_frames import head_entropy_frame
from normfree.runner.run_order import SWEEP_DECAY
from normfree.runner.study import Collection, Study
from normfree.runner.study_folder import LEARNING_RATE_FACTORS, STUDY_FILE
from normfree.training import RunResult
from normfree.training.run_config import read_yaml
from normfree.training.run_folder import CONFIG_FILE, RESULTS_FILE

REPORT_FILE = "report.html"


def write_study_report(study: Study, page: StudyPage) -> Path:
    """Writes ``results.csv``, ``figures/`` and ``report.html`` into the study's folder; returns the report's path.

    Raises:
        InputError: no run of the baseline is finished.
    """
    write_text(page.path / RESULTS_FILE, page.runs.to_csv(index=False, na_rep="nan"))
    findings = study.describe(page)
    sections = [_result_section(page), *([_tuned_section(page)] if page.tuned else []), *findings.sections]
    terms = glossary([*page.labels, *_words(sections)])
    return write_page(
        page.path / REPORT_FILE,
        title=study.title,
        lead=findings.lead,
        sections=[*sections, *([terms] if terms else []), _method_section(page, findings.limits)],
        meta={"Preset": page.folder.preset_name},
        facts=_runs_facts([page]),
        sources=study.papers,
        caution=page.folder.preset.caution or "",
    )


def write_collection_report(
    collection: Collection, path: Path, pages: Sequence[StudyPage], table: pd.DataFrame, reports: Sequence[Path]
) -> Path:
    """Writes ``results.csv`` (the ``table``) and ``report.html`` into a collection's folder; returns the report's path.

    Args:
        collection: whose report it is.
        path: its folder.
        pages: the finished runs of its studies.
        table: the collection's own.
        reports: those of its studies.
    """
    write_text(path / RESULTS_FILE, table.to_csv(index=False, na_rep="nan"))
    findings = collection.describe(pages, table, path)
    listed = ", ".join(str(each.relative_to(path)) for each in reports)
    how = f"Figures, corpus and configuration of each study are in its own report: {listed}."
    caption = "Evaluation loss and perplexity by model, context length and configuration."
    sections = [
        Section("Result", [_table_block(table, caption)]),
        *findings.sections,
        Section("How it was made", [*_commands(pages), Paragraph(how), Callout(findings.limits, "warning")]),
    ]
    terms = glossary([label for page in pages for label in page.labels] + _words(sections))
    cautions = dict.fromkeys(filter(None, (page.folder.preset.caution for page in pages)))
    return write_page(
        path / REPORT_FILE,
        title=collection.title,
        lead=findings.lead,
        sections=[*sections[:-1], *([terms] if terms else []), sections[-1]],
        meta={"Presets": ", ".join(page.folder.preset_name for page in pages)},
        facts=_runs_facts(pages),
        sources=collection.papers,
        caution=" ".join(cautions),
    )


def _runs_facts(pages: Sequence[StudyPage]) -> list[str]:
    """The presets, and how many runs there are and how long they trained."""
    presets = list(dict.fromkeys(page.folder.preset_name for page in pages))
    n_run = sum(len(page.runs) for page in pages)
    seconds = sum(page.training_seconds for page in pages)
    named = f"preset{'s' * (len(presets) > 1)} {', '.join(presets)}"
    return [named, f"{counted(n_run, 'run')}, {duration(seconds)} of training"]


def _words(sections: Sequence[Section]) -> list[str]:
    """What the tables and figures of ``sections`` say, for the glossary."""
    words = []
    for element in (each for section in sections for each in section.elements):
        if isinstance(element, Table):
            words += [element.caption, *map(str, element.frame.columns), *element.groups]
        elif isinstance(element, FigureElement):
            words.append(element.caption)
    return words


def _result_section(page: StudyPage) -> Section:
    rate = f"{page.folder.preset.recipe.learning_rate:g}"
    caption = f"Evaluation loss and perplexity at the recipe's learning rate, {rate}."
    blocks: list[Element] = [_table_block(page.table, caption)]
    if (page.table["diverged"] > 0).any():
        told = "A diverged run has no perplexity. It is shown as NaN, and means that include it are NaN."
        blocks.append(Callout(told, "warning"))
    return Section("Result", blocks)


def _tuned_section(page: StudyPage) -> Section:
    rates = {str(each.row["configuration"]): each.row["learning_rate"] for each in page.tuned}
    left_out = [label for label in in_order(page.table["configuration"]) if label not in rates]
    grid = [factor * page.folder.preset.recipe.learning_rate for factor in LEARNING_RATE_FACTORS]
    at_the_edge = [label for label, rate in rates.items() if rate in (min(grid), max(grid))]
    losses = _sweep_losses(page, list(rates))
    blocks: list[Element] = [
        Paragraph(
            f"Is a configuration worse, or only less tolerant of the learning rate? Each was trained at "
            f"{len(grid)} rates, with the whole run's warm-up and a decay over {100 * SWEEP_DECAY:.0f} % of the "
            "budget, and for the whole budget at its best rate: "
            + "; ".join(f"{label}: {rate:g}" for label, rate in rates.items())  # there are commas in labels
            + "."
        ),
        _table_block(page.tables["tuned_table"], "The same table, each configuration at its own best rate."),
        Table(
            losses,
            "The sweep: evaluation loss in nats by learning rate, one seed. NaN: diverged.",
            formats=dict.fromkeys(losses.columns[1:], ".3f"),
            groups={"Learning rate": list(losses.columns[1:])},
        ),
        page.figure(
            "headwise-entropy-tuned",
            headwise_entropy_heatmaps(head_entropy_frame(page.tuned), maximum=page.uniform_bound),
            "Attention entropy of every head in nats, each configuration at its own best rate: final weights, "
            "evaluation tokens, one colour scale.",
        ),
    ]
    if left_out:
        blocks.append(Callout(f"Not tuned: {'; '.join(left_out)}.", "warning"))
    if at_the_edge:
        blocks.append(Callout(f"The best rate is at the edge of the sweep: {'; '.join(at_the_edge)}.", "warning"))
    return Section("With tuned learning rates", blocks)


def _sweep_losses(page: StudyPage, labels: list[str]) -> pd.DataFrame:
    """Configuration (``labels``), and a column for each learning rate: evaluation loss in nats, NaN if it diverged."""
    sweep = pd.DataFrame([result.row for result in page.folder.results("sweep")])
    losses = sweep.pivot_table(
        index="configuration", columns="learning_rate", values=EVAL_LOSS, sort=False, dropna=False
    )
    losses = losses.reindex(labels)[sorted(losses.columns)]
    losses.columns = [f"{rate:g}" for rate in losses.columns]
    return losses.reset_index(names="Configuration")


def _method_section(page: StudyPage, limits: str) -> Section:
    seeds = sorted({int(each.row["seed"]) for each in page.results})
    limits = " ".join(filter(None, (limits.strip(), _seed_limits(page.results))))
    return Section(
        "How it was made",
        [
            KeyValues(_facts(page, seeds)),
            Paragraph(
                "Models of one shape start from the same weights, and all see the same batches in the same order."
            ),
            *_commands([page]),
            Callout(limits, "warning"),
            Paragraph("The whole configuration:"),
            Code((page.path / STUDY_FILE).read_text(encoding="utf-8").rstrip()),
        ],
    )


def _seed_limits(results: Sequence[RunResult]) -> str:
    """What the runs' seeds leave open: one seed has no spread, and means over different seeds differ by the seeds."""
    seeds: dict[str, set[int]] = {}
    for each in results:
        seeds.setdefault(each.row["configuration"], set()).add(int(each.row["seed"]))
    if len(set.union(*seeds.values())) == 1:
        return "With one seed there is no estimate of the spread between seeds."
    labels: dict[str, list[str]] = {}
    for label, own in seeds.items():
        labels.setdefault(", ".join(map(str, sorted(own))), []).append(label)
    if len(labels) == 1:
        return ""
    groups = "; ".join(f"{own} ({', '.join(group)})" for own, group in labels.items())
    return (
        f"Configurations have different seeds: {groups}. Their means differ by the seeds as well; differences from the "
        "baseline are between runs of one seed."
    )


def _commands(pages: Sequence[StudyPage]) -> list[Element]:
    """The commands that trained the runs, for a shell."""
    commands = dict.fromkeys(each for page in pages for each in page.folder.commands)
    return [Code("\n".join(commands))] if commands else []


def _facts(page: StudyPage, seeds: Sequence[int]) -> dict[str, str]:
    preset, row = page.folder.preset, page.results[0].row
    provenance = read_yaml(page.results[0].folder / CONFIG_FILE)["provenance"]
    return {
        "Model": f"{preset.model_name}: {row['n_parameters']:,} parameters ({row['configuration']})",
        "Corpus": _corpus_facts(preset.data.corpus, provenance),
        "Training": f"{int(row['tokens']):,} tokens ({row['epochs']:.2f} epochs), "
        f"{counted(int(row['steps']), 'step')} of {counted(preset.recipe.batch_size, 'sequence')} of "
        f"{preset.data.sequence_length} tokens",
        "Evaluation": f"{counted(int(row['eval_sequences']), 'sequence')} of files that no run was trained on",
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Precision": preset.recipe.precision,
        "Device": f"{provenance['device']}, {counted(provenance['cpu_threads'], 'CPU thread')}",
        "Versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
    }


def _corpus_facts(corpus: str, provenance: dict[str, Any]) -> str:
    statistics = provenance["corpus"]
    found, train, evaluation = statistics["corpus"], statistics["train"], statistics["eval"]
    reasons = ("duplicates", "undecodable", "binary", "too_large", "empty", "unreadable")
    skipped = ", ".join(f"{found[reason]:,} {reason.replace('_', ' ')}" for reason in reasons if found[reason])
    return (
        f"{corpus}: {counted(found['documents'], 'document')}, {found['bytes'] / 1e6:.0f} MB"
        f" (skipped: {skipped or 'none'});"
        f" {counted(train['documents'], 'document')} tokenized for training and {evaluation['documents']:,} for "
        "evaluation,"
        f" {evaluation['bytes_per_token']:.2f} bytes a token; fingerprint {provenance['corpus_fingerprint']}"
    )


def _table_block(table: pd.DataFrame, caption: str) -> Table:
    return Table(formatted(table), caption, notes=table_notes(table), groups=column_groups(table))
