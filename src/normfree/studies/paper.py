"""ReLU's Revival as a whole: Table 2 over all its models, and with it every figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from normfree.columns import EVAL_PPL
from normfree.errors import InputError
from normfree.report import FIGURES_FOLDER, Section
from normfree.report.frames import SETTING
from normfree.runner import Collection, Configuration, Findings, Member, Preset, Study, StudyPage, load_preset
from normfree.studies import learnable_slopes, relu_revival
from normfree.studies.negative_slope.study import STUDY as NEGATIVE_SLOPE

COLUMN_PRESETS = ("cpu", "gpu", "paper-gpt2-128")
"""Presets that name the columns of Table 2 at their scale."""
PARTS = (relu_revival.STUDY, learnable_slopes.STUDY, NEGATIVE_SLOPE)


def _configurations(preset: Preset) -> tuple[Configuration, ...]:
    """Those of every part, each once: a run that two figures show is trained once."""
    every = {each.label: each for part in PARTS for each in part.configurations(preset)}
    return tuple(every.values())


def _describe_figures(page: StudyPage) -> Findings:
    trained = {each.row["configuration"] for each in page.results}
    findings = {
        part.name: part.describe(part.page(page.folder, f"{FIGURES_FOLDER}/{part.name}"))
        for part in PARTS
        if part.baseline in trained
    }
    return Findings(
        lead=" ".join(each.lead for each in findings.values()),
        sections=[
            Section(f"{name}: {section.title}", section.elements)
            for name, each in findings.items()
            for section in each.sections
        ],
        limits=" ".join(dict.fromkeys(each.limits for each in findings.values())),
    )


FIGURES: Study = Study(
    name="relu-revival-figures",
    title="ReLU's Revival: every figure",
    question="Figures 1 to 5 of ReLU's Revival, in one study.",
    baseline=relu_revival.STUDY.baseline,
    configurations=_configurations,
    describe=_describe_figures,
    papers=relu_revival.STUDY.papers,
)


def _columns(preset_name: str, changed: Callable[[Preset], Preset]) -> list[Member]:
    """The columns of Table 2 that the preset names, each with the four configurations."""
    names = load_preset(preset_name).columns
    if not names:
        raise InputError(f"preset {preset_name} names no columns of Table 2; add `columns: [PRESET, ...]` to it")
    folder = Path(preset_name).parent
    paths = {Path(name).stem: str(folder / name) if name.endswith((".yaml", ".yml")) else name for name in names}
    return [Member(stem, relu_revival.STUDY, stem, changed(load_preset(path))) for stem, path in paths.items()]


def _columns_and_figures(preset_name: str, changed: Callable[[Preset], Preset]) -> list[Member]:
    """The same, and every figure of the paper in the first column's study."""
    first, *rest = _columns(preset_name, changed)
    return [Member(first.folder, FIGURES, first.preset_name, first.preset), *rest]


def _table(pages: Sequence[StudyPage]) -> pd.DataFrame:
    """Table 2: the four configurations of each column."""
    columns = [relu_revival.STUDY.page(page.folder).table for page in pages]
    return pd.concat(columns, ignore_index=True)


def _describe(pages: Sequence[StudyPage], table: pd.DataFrame, _: Path) -> Findings:
    """The order of the configurations in each column, measured and published."""
    verdicts = []
    for (model, context_length), rows in table.groupby(list(SETTING), sort=False):
        ranked = rows.dropna(subset=[EVAL_PPL]).sort_values(EVAL_PPL)["configuration"]
        published = rows.dropna(subset=["published_ppl"]).sort_values("published_ppl")["configuration"]
        verdict = f"{model}, T = {context_length}: {' < '.join(ranked)}"
        verdicts.append(verdict + (f" (published: {' < '.join(published)})." if len(published) else "."))
    limits = relu_revival.scale_limits(pages[0]).strip()
    return Findings("Perplexity, best first. " + " ".join(verdicts), [], limits)


TABLE_2: Collection = Collection(
    "table-2",
    "ReLU's Revival: Table 2",
    _columns,
    _table,
    _describe,
    question="GELU or ReLU, with or without LayerNorm, for each model and context length of Table 2?",
    presets=COLUMN_PRESETS,
    papers=relu_revival.STUDY.papers,
)
EVERYTHING: Collection = Collection(
    "relu-revival-all",
    "ReLU's Revival: every table and figure",
    _columns_and_figures,
    _table,
    _describe,
    question="Every table and figure of ReLU's Revival; also: relu-revival --all.",
    presets=COLUMN_PRESETS,
    papers=relu_revival.STUDY.papers,
)
STUDIES = (FIGURES, TABLE_2, EVERYTHING)
