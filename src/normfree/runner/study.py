"""Studies: grids of configurations, trained on the same data with the same recipe and seeds.

A collection is several studies that one command trains and shows together, such as the columns of a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.report import FIGURES_FOLDER, Link
from normfree.runner.page import Findings, StudyPage
from normfree.runner.presets import Preset
from normfree.runner.study_folder import StudyFolder
from normfree.training import Recipe, RunConfig, RunResult

GENERAL_PRESETS = ("smoke", "cpu", "cpu-brief", "gpu", "paper-gpt2-128", "paper-pythia-128", "paper-pythia-256")


@dataclass(frozen=True)
class Configuration:
    """One line of a study's table: a label such as ``SM+G``, and the model, recipe and objective that make it.

    ``objective`` holds the options of one of :data:`normfree.training.OBJECTIVES`; None is plain cross-entropy. Its
    ``teacher``, if it has one, is the label of an earlier configuration of the study: the student learns from that
    configuration's run with the same seed, at the recipe's learning rate.
    """

    label: str
    model: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] | None = None

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return slug(self.label)

    @property
    def teacher(self) -> str | None:
        """The label of the configuration it learns from, if it learns from one."""
        return self.objective.get("teacher") if self.objective is not None else None


@dataclass(frozen=True)
class Measurement:
    """A study's own measurement of each finished run, on the study's data.

    check: called before training; raises InputError if this machine cannot measure.
    measure: writes results into the run's folder, where ``describe`` reads them; skips those that exist.
    """

    check: Callable[[], None]
    measure: Callable[[RunResult, PackedData, Console], None]


@dataclass(frozen=True)
class Study:
    """A comparison of configurations, and its part of the report.

    name: of the command, with letters, digits, dots, dashes and underscores.
    title: of the report.
    baseline: label of the configuration that the others are compared with.
    configurations: from the preset, because some studies have one for each layer.
    describe: the study's own part of the report.
    measurement: from the preset.
    question: what the study asks, in one line.
    presets: those that fit it.
    papers: those it follows; the report links them.
    """

    name: str
    title: str
    baseline: str
    configurations: Callable[[Preset], tuple[Configuration, ...]]
    describe: Callable[[StudyPage], Findings]
    measurement: Callable[[Preset], Measurement] | None = None
    question: str = ""
    presets: tuple[str, ...] = GENERAL_PRESETS
    papers: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)

    def page(self, folder: StudyFolder, figures: str = FIGURES_FOLDER) -> StudyPage:
        """The finished runs of this study's configurations in ``folder``; its figures go into ``figures`` there."""
        return StudyPage(folder, self.baseline, self.labels(folder.preset), figures)

    def labels(self, preset: Preset) -> tuple[str, ...]:
        """Labels of the configurations at ``preset``, in their order."""
        return tuple(each.label for each in self.configurations(preset))


@dataclass(frozen=True)
class Member:
    """One study of a collection: the folder's name in the collection, the study, and its preset with its name."""

    folder: str
    study: Study
    preset_name: str
    preset: Preset


@dataclass(frozen=True)
class Collection:
    """Several studies with a common report.

    members: from the preset's name and a function that makes the caller's changes to a preset. Each study must be
        declared itself where the collection is, so that workers find it.
    table: the rows of the collection's own table, from the pages of its members.
    describe: its part of the report, from the pages, that table and the collection's folder.
    """

    name: str
    title: str
    members: Callable[[str, Callable[[Preset], Preset]], Sequence[Member]]
    table: Callable[[Sequence[StudyPage]], pd.DataFrame]
    describe: Callable[[Sequence[StudyPage], pd.DataFrame, Path], Findings]
    question: str = ""
    presets: tuple[str, ...] = GENERAL_PRESETS
    papers: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)


def run_config(
    preset: Preset, configuration: Configuration, seed: int, *, learning_rate: float | None = None
) -> RunConfig:
    """One run of a study; ``learning_rate`` replaces the recipe's.

    Raises:
        ValueError: the configuration's recipe or objective is not allowed.
    """
    recipe = Recipe.model_validate({**preset.recipe.model_dump(), **configuration.recipe})
    if learning_rate is not None:
        recipe = recipe.model_copy(update={"learning_rate": learning_rate})
    objective = configuration.objective
    if configuration.teacher is not None:
        # Relative to the run's folder, so that a study can be moved: every run lies three folders deep.
        objective = {**(objective or {}), "teacher": f"../../../runs/{slug(configuration.teacher)}/seed-{seed}"}
    return RunConfig.model_validate(
        {
            "model_name": preset.model_name,
            "configuration": configuration.label,
            "seed": seed,
            "model": {**preset.model, **configuration.model},
            "data": preset.data,
            "recipe": recipe,
            "objective": objective,
        }
    )


def slug(label: str) -> str:
    """A configuration's label as a folder name; ``*`` is spelled out, as some labels differ in it alone."""
    return re.sub(r"[^a-z0-9.-]+", "-", label.lower().replace("*", "-star"))


def _check_name(name: str) -> None:
    """Raises InputError unless ``name`` can be part of a folder's name."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise InputError(f"the name of a study has letters, digits, dots, dashes and underscores only: {name!r}")
