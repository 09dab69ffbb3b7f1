"""Studies and collections in their folders: begun, opened, trained, and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import yaml

from normfree.errors import InputError, unknown_name
from normfree.files import write_text
from normfree.runner.catalog import Found, studies_for, study_of
from normfree.runner.driver import train_study
from normfree.runner.execution import Execution
from normfree.runner.page import StudyPage
from normfree.runner.presets import Preset, load_preset
from normfree.runner.reporting import write_collection_report, write_study_report
from normfree.runner.study import Collection, Study
from normfree.runner.study_folder import COLLECTION_FILE, STUDY_FILE, StudyFolder, check_unused
from normfree.training.run_config import read_yaml


@dataclass(frozen=True)
class OpenStudy:
    """A study and its folder."""

    study: Study
    folder: StudyFolder

    @cached_property
    def page(self) -> StudyPage:
        """The finished runs."""
        return self.study.page(self.folder)

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def members(self) -> Sequence[OpenStudy]:
        """The studies with runs: itself."""
        return [self]

    def chosen(self, only: tuple[str, ...] | None) -> Sequence[tuple[OpenStudy, tuple[str, ...] | None]]:
        """The studies with runs, with the labels of ``only`` that each is to train; None for all."""
        return [(self, only)]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """See :attr:`normfree.runner.StudyPage.tables`."""
        return self.page.tables

    @property
    def runs(self) -> pd.DataFrame:
        """What ``results.csv`` holds: a row a finished run."""
        return self.page.runs

    def run(self, execution: Execution) -> dict[str, str]:
        """Trains the study. See :func:`~normfree.runner.driver.train_study`.

        Raises:
            InputError: a configuration, the recipe or the corpus cannot be used; then the folder is not touched.
        """
        return train_study(self.study, self.folder, execution)

    def write(self) -> Path:
        """Writes ``results.csv``, ``figures/`` and ``report.html``; returns the report's path.

        Raises:
            InputError: no run of the baseline is finished.
        """
        return write_study_report(self.study, self.page)


@dataclass(frozen=True)
class OpenCollection:
    """A collection and its folder: ``collection.yaml``, and a folder for each study."""

    collection: Collection
    path: Path
    members: Sequence[OpenStudy]
    study_file: Path | None = None

    @property
    def name(self) -> str:
        return self.collection.name

    @property
    def pages(self) -> list[StudyPage]:
        """The finished runs of each study."""
        return [each.page for each in self.members]

    def chosen(self, only: tuple[str, ...] | None) -> Sequence[tuple[OpenStudy, tuple[str, ...] | None]]:
        """Each study with those labels of ``only`` that it has, none for its baseline alone; None for all.

        Raises:
            InputError: no study has a configuration of one of the labels.
        """
        if only is None:
            return [(each, None) for each in self.members]
        labels = [each.study.labels(each.folder.preset) for each in self.members]
        every = list(dict.fromkeys(label for of_member in labels for label in of_member))
        for label in only:
            if label not in every:
                raise unknown_name("configuration", label, every)
        return [
            (each, tuple(label for label in only if label in own))
            for each, own in zip(self.members, labels, strict=True)
        ]

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The collection's own ``table``, from the finished runs of its studies."""
        return {"table": self.collection.table(self.pages)}

    @property
    def runs(self) -> pd.DataFrame:
        """What ``results.csv`` holds: the collection's table."""
        return self.tables["table"]

    def run(self, execution: Execution) -> dict[str, str]:
        """Trains every study in turn. See :func:`~normfree.runner.driver.train_study`.

        Raises:
            InputError: a configuration, a recipe or a corpus cannot be used.
        """
        chosen = self.chosen(execution.only)
        content = {
            "collection": self.name,
            **({} if self.study_file is None else {"study_file": str(self.study_file)}),
            "members": [each.path.name for each in self.members],
        }
        if not (self.path / COLLECTION_FILE).exists():
            write_text(self.path / COLLECTION_FILE, yaml.safe_dump(content, sort_keys=False))
        failures: dict[str, str] = {}
        for each, only in chosen:
            execution.console.print(f"{each.path.name}: {each.folder.preset.description}", highlight=False)
            failed = each.run(replace(execution, only=only))
            failures |= {f"{each.path.name}/{place}": reason for place, reason in failed.items()}
        return failures

    def write(self) -> Path:
        """Writes each study's own report, ``results.csv`` (the table) and ``report.html``; returns the report's path.

        Raises:
            InputError: a study has no finished run of its baseline.
        """
        reports = [each.write() for each in self.members]
        return write_collection_report(self.collection, self.path, self.pages, self.runs, reports)


def begin(
    found: Found, path: Path, preset_name: str, changed: Callable[[Preset], Preset]
) -> OpenStudy | OpenCollection:
    """A study or collection at ``path``, new or existing, with a preset to which ``changed`` is applied.

    Raises:
        InputError: the preset is unknown, or the folder holds something else.
    """
    study, file = found.study, found.file
    if isinstance(study, Study):
        preset = changed(load_preset(preset_name))
        return OpenStudy(study, StudyFolder.at(path, study.name, Path(preset_name).stem, preset, file))
    if (path / COLLECTION_FILE).exists():
        name = read_yaml(path / COLLECTION_FILE).get("collection")
        if name != study.name:
            raise InputError(f"{path} holds another collection ({name}); give another folder with --out")
    else:
        check_unused(path, f"is no collection ({COLLECTION_FILE} is missing)")
    members = [
        OpenStudy(each.study, StudyFolder.at(path / each.folder, each.study.name, each.preset_name, each.preset, file))
        for each in study.members(preset_name, changed)
    ]
    return OpenCollection(study, path, members, file)


def open_folder(path: Path, reference: str | Path | None = None) -> OpenStudy | OpenCollection:
    """The study or collection in ``path``, to read what is there.

    ``reference`` names the study, if it is not installed (see :func:`normfree.runner.catalog.studies_for`).

    Raises:
        InputError: there is no study, it is unknown or of a file that is not given, or none of its studies has begun.
    """
    if (path / COLLECTION_FILE).exists():
        content = read_yaml(path / COLLECTION_FILE)
        studies = studies_for(path, content.get("study_file"), reference)
        collection = studies.get(str(content.get("collection")))
        if not isinstance(collection, Collection):
            names = [name for name, each in studies.items() if isinstance(each, Collection)]
            raise unknown_name("collection", content.get("collection"), names)
        folders = [path / _member(path, str(each)) for each in content.get("members", [])]
        begun = [StudyFolder.open(each) for each in folders if (each / STUDY_FILE).exists()]
        if begun:
            return OpenCollection(collection, path, [OpenStudy(study_of(each, studies), each) for each in begun])
    folder = StudyFolder.open(path)
    return OpenStudy(study_of(folder, studies_for(path, folder.study_file, reference)), folder)


def _member(path: Path, name: str) -> str:
    """A folder in a collection, which is written into: it must lie in it."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise InputError(f"{path / COLLECTION_FILE}: the member {name!r} names no folder in it; restore the file")
    return name
