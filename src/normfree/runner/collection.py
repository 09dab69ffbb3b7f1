"""A collection: several studies that are trained by one command and shown together, such as the columns of a table."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import yaml

from normfree.errors import InputError
from normfree.files import write_text
from normfree.locks import holds_nothing
from normfree.report import Callout, Paragraph, Section, formatted, render_report, write_report
from normfree.report import Table as TableBlock
from normfree.report.tables import table_notes
from normfree.runner.execution import Execution
from normfree.runner.page import REPORT_FILE, Findings, StudyPage
from normfree.runner.presets import Preset
from normfree.runner.study import GENERAL_PRESETS, Study, StudyFolder, check_name
from normfree.training.configuration import read_yaml
from normfree.training.run_folder import RESULTS_FILE

COLLECTION_FILE = "collection.yaml"


@dataclass(frozen=True)
class Member:
    """One study of a collection: the folder's name in the collection, the study, and its preset with its name."""

    folder: str
    study: Study
    preset_name: str
    preset: Preset


@dataclass(frozen=True)
class Collection:
    """Which studies, and what is shown of them together.

    ``members`` come from the preset's name and a function that makes the caller's changes to a preset; ``table`` picks
    the rows of the collection's own table from the pages of its members; ``describe`` makes its part of the report
    from the pages, that table and the collection's folder.
    """

    name: str
    title: str
    members: Callable[[str, Callable[[Preset], Preset]], Sequence[Member]]
    table: Callable[[Sequence[StudyPage]], pd.DataFrame]
    describe: Callable[[Sequence[StudyPage], pd.DataFrame, Path], Findings]
    question: str = ""
    presets: tuple[str, ...] = GENERAL_PRESETS

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True)
class CollectionFolder:
    """The folder of a collection: ``collection.yaml``, and the folder of each study in it."""

    path: Path
    collection: Collection
    pages: Sequence[StudyPage]
    study_file: Path | None = None

    @classmethod
    def at(
        cls,
        path: Path,
        collection: Collection,
        preset_name: str,
        changed: Callable[[Preset], Preset],
        study_file: Path | None = None,
    ) -> CollectionFolder:
        """The folder of this collection at ``path``: the one that is there, or one that :meth:`run` makes.

        Raises:
            InputError: the folder holds something else, or a member's folder another study.
        """
        if (path / COLLECTION_FILE).exists():
            there = read_yaml(path / COLLECTION_FILE).get("collection")
            if there != collection.name:
                raise InputError(f"{path} holds another collection ({there}); give another folder with --out")
        elif path.exists() and (not path.is_dir() or not holds_nothing(path)):
            raise InputError(
                f"{path} exists and is no collection ({COLLECTION_FILE} is missing); give another with --out"
            )
        members = collection.members(preset_name, changed)
        folders = [
            StudyFolder.at(path / each.folder, each.study, each.preset_name, each.preset, study_file)
            for each in members
        ]
        pages = [StudyPage(each.study, folder) for each, folder in zip(members, folders, strict=True)]
        return cls(path, collection, pages, study_file)

    def run(self, execution: Execution) -> dict[str, str]:
        """Trains every study, one after the other. See
        :func:`~normfree.runner.execution.train_study`.

        Raises:
            InputError: a configuration, a recipe or a corpus cannot be used.
        """
        content = {
            "collection": self.collection.name,
            **({} if self.study_file is None else {"study_file": str(self.study_file)}),
            "members": [page.path.name for page in self.pages],
        }
        if not (self.path / COLLECTION_FILE).exists():
            write_text(self.path / COLLECTION_FILE, yaml.safe_dump(content, sort_keys=False))
        failures: dict[str, str] = {}
        for page in self.pages:
            execution.console.print(f"{page.path.name}: {page.folder.preset.description}", highlight=False)
            failed = page.run(execution)
            failures |= {f"{page.path.name}/{place}": reason for place, reason in failed.items()}
        return failures

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The collection's own ``table``, from the finished runs of its members."""
        return {"table": self.collection.table(self.pages)}

    @property
    def runs(self) -> pd.DataFrame:
        """What ``results.csv`` holds: the collection's table."""
        return self.tables["table"]

    def write(self) -> Path:
        """Writes each study's own report, ``results.csv`` (the table) and ``report.html``; returns the page's path.

        Raises:
            InputError: a study has no finished run of its baseline.
        """
        reports = [page.write() for page in self.pages]
        table = self.tables["table"]
        write_text(self.path / RESULTS_FILE, self.runs.to_csv(index=False, na_rep="nan"))
        findings = self.collection.describe(self.pages, table, self.path)
        own = Section(
            "Result",
            [
                TableBlock(
                    formatted(table),
                    "Evaluation loss and perplexity by model, context length and configuration.",
                    notes=table_notes(table),
                ),
            ],
        )
        how = Section(
            "How it was made",
            [
                Paragraph(
                    "Figures, corpus, configuration and command of each study are in its own report: "
                    + ", ".join(str(each.relative_to(self.path)) for each in reports)
                    + "."
                ),
                Callout(findings.limits, "warning"),
            ],
        )
        page = render_report(
            title=self.collection.title,
            lead=findings.lead,
            sections=[own, *findings.sections, how],
            meta={
                "Made by": f"normfree {importlib.metadata.version('normfree')}",
                "Date": datetime.date.today().isoformat(),
                "Presets": ", ".join(page.folder.preset_name for page in self.pages),
            },
        )
        write_report(self.path / REPORT_FILE, page)
        return self.path / REPORT_FILE
