"""A study: a named grid of configurations, trained on the same data with the same recipe and seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from normfree.data import PackedData, prepare_data, same_data
from normfree.errors import InputError
from normfree.files import write_text
from normfree.locks import holds_nothing
from normfree.runner.presets import Preset
from normfree.training import Recipe, RunConfig, RunResult, load_result
from normfree.training.configuration import read_yaml
from normfree.training.run_folder import RESULTS_FILE

if TYPE_CHECKING:
    from normfree.runner.page import Findings, StudyPage

STUDY_FILE = "study.yaml"
GENERAL_PRESETS = ("smoke", "cpu", "gpu", "paper-gpt2-128", "paper-pythia-128", "paper-pythia-256")


@dataclass(frozen=True)
class Configuration:
    """One line of a study's table: a label such as ``SM+G``, and the model, recipe and objective that make it.

    ``objective`` holds the options of one of :data:`normfree.training.OBJECTIVES`; none means plain cross-entropy. Its
    ``teacher``, if it has one, is the label of a configuration that stands before this one in the study: the student
    learns from that one's run with the same seed, at the recipe's learning rate.
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
    """What a study measures of each finished run, on the study's data, beyond what every training measures.

    ``check`` is asked before anything is trained, and raises an InputError where this machine cannot measure.
    ``measure`` leaves what it found in the run's folder, where the report reads it, and skips what is there; it shows
    its progress on the console.
    """

    check: Callable[[], None]
    measure: Callable[[RunResult, PackedData, Console], None]


@dataclass(frozen=True)
class Study:
    """What is compared, and what is shown of it.

    ``baseline`` is the label that the others are measured against. ``configurations`` come from the preset, because
    some studies have one for each layer, and so does the ``measurement``. ``describe`` makes the study's own part of
    the report. ``question`` is what the study asks, in one line, and ``presets`` are those made for it.
    """

    name: str
    title: str
    baseline: str
    configurations: Callable[[Preset], tuple[Configuration, ...]]
    describe: Callable[[StudyPage], Findings]
    measurement: Callable[[Preset], Measurement] | None = None
    question: str = ""
    presets: tuple[str, ...] = GENERAL_PRESETS

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study: ``runs/CONFIGURATION/seed-N``, and with tuned learning rates ``sweep`` and ``tuned``.

    Got with :meth:`at` to train in it, or with :meth:`open` to read what is there.
    """

    path: Path
    study_name: str
    preset_name: str
    preset: Preset
    corpus_fingerprint: str | None = None
    study_file: Path | None = None

    @classmethod
    def at(
        cls, path: Path, study: Study, preset_name: str, preset: Preset, study_file: Path | None = None
    ) -> StudyFolder:
        """The folder of this study at ``path``: the one that is there, or one that :meth:`claim` can make.

        More seeds and tuned learning rates can be added to a study that is there; its sizes cannot change.
        ``study_file`` is the user's file that defines the study; None for an installed study.

        Raises:
            InputError: the folder holds another study, or files that are no study.
        """
        if (path / STUDY_FILE).exists():
            there = cls.open(path)
            if there.study_name != study.name or _identity(there.preset) != _identity(preset):
                raise InputError(
                    f"{path} holds another study ({there.study_name}, preset {there.preset_name}, "
                    "with other options); give another folder with --out, or the same options"
                )
            return replace(there, study_file=study_file)
        if path.exists() and (not path.is_dir() or not holds_nothing(path)):
            raise InputError(f"{path} exists and is no study folder ({STUDY_FILE} is missing); give another with --out")
        return cls(path, study.name, preset_name, preset, study_file=study_file)

    def prepare_data(self, cache_dir: Path, *, progress: bool) -> PackedData:
        """The study's tokens. A study that is there goes on with those it began with, though the corpus may change.

        Raises:
            InputError: the corpus cannot be used, or has changed and the study's tokens are no longer in the cache.
        """
        if self.corpus_fingerprint is None:
            return prepare_data(self.preset.data, cache_dir, progress=progress)
        return same_data(self.preset.data, cache_dir, self.corpus_fingerprint, progress=progress)

    def claim(self, data: PackedData) -> None:
        """Writes ``study.yaml``, so that the folder is this study's and its corpus ``data``."""
        if not (self.path / STUDY_FILE).exists() or StudyFolder.open(self.path).study_file != self.study_file:
            content = {
                "study": self.study_name,
                **({} if self.study_file is None else {"study_file": str(self.study_file)}),
                "preset": self.preset_name,
                "corpus_fingerprint": data.fingerprint,
                **self.preset.model_dump(mode="json", exclude_none=True),
            }
            write_text(self.path / STUDY_FILE, yaml.safe_dump(content, sort_keys=False))

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """The study in ``path``.

        Raises:
            InputError: there is none, or its ``study.yaml`` cannot be read.
        """
        if not (path / STUDY_FILE).exists():
            raise InputError(f"{path} is no study folder ({STUDY_FILE} is missing); run `normfree study` first")
        content = read_yaml(path / STUDY_FILE)
        try:
            names = [str(content.pop(key)) for key in ("study", "preset", "corpus_fingerprint")]
            file = content.pop("study_file", None)
            preset = Preset.model_validate(content)
            return cls(path, names[0], names[1], preset, names[2], None if file is None else Path(str(file)))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path / STUDY_FILE} is damaged ({error}); run the study in another folder") from error

    @property
    def reference(self) -> str:
        """The name by which another process finds the study (see :func:`normfree.runner.find_study`)."""
        return self.study_name if self.study_file is None else f"{self.study_file}:{self.study_name}"

    def results(self, group: str) -> list[RunResult]:
        """The finished runs of a group (``runs``, ``sweep``, ``tuned``), in no particular order."""
        return [load_result(path.parent) for path in sorted(self.path.glob(f"{group}/*/*/{RESULTS_FILE}"))]


def best_learning_rates(folder: StudyFolder) -> dict[str, float]:
    """The learning rate with the lowest evaluation loss in the sweep, by configuration.

    A configuration that diverged at every rate keeps the recipe's.
    """
    best: dict[str, tuple[float, float]] = {}
    for result in folder.results("sweep"):
        label, loss, rate = (result.row[name] for name in ("configuration", "eval_loss", "learning_rate"))
        fallback = (float("inf"), folder.preset.recipe.learning_rate)
        best[label] = min(best.get(label, fallback), (loss, rate) if loss == loss else fallback)
    return {label: rate for label, (_, rate) in best.items()}


def run_config(
    preset: Preset, configuration: Configuration, seed: int, *, learning_rate: float | None = None
) -> RunConfig:
    """One run of a study; ``learning_rate`` in place of the recipe's, if given."""
    recipe = Recipe.model_validate({**preset.recipe.model_dump(), **configuration.recipe})
    if learning_rate is not None:
        recipe = recipe.model_copy(update={"learning_rate": learning_rate})
    objective = configuration.objective
    if configuration.teacher is not None:
        # From the run's own folder, so that a study can be moved: every run lies three folders deep.
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
    """A configuration's label as a folder name; ``*`` by its name, for methods whose names differ in it only."""
    return re.sub(r"[^a-z0-9.-]+", "-", label.lower().replace("*", "-star"))


def check_name(name: str) -> None:
    """A study's name is part of folder names.

    Raises:
        InputError: it could not be.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise InputError(f"the name of a study has letters, digits, dots, dashes and underscores only: {name!r}")


def _identity(preset: Preset) -> dict[str, Any]:
    return preset.model_dump(mode="json", exclude={"seeds", "description", "columns"})
