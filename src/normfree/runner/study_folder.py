"""The folder of a study: its preset, its corpus, and its finished runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from normfree.columns import EVAL_LOSS
from normfree.data import PackedData, prepare_data, same_data
from normfree.errors import InputError
from normfree.files import write_text
from normfree.locks import holds_nothing
from normfree.runner.presets import Preset
from normfree.training import RunResult, load_result
from normfree.training.run_config import read_yaml
from normfree.training.run_folder import RESULTS_FILE

STUDY_FILE = "study.yaml"
COLLECTION_FILE = "collection.yaml"
COMMANDS_FILE = "commands.yaml"
GROUPS = ("runs", "sweep", "tuned")
"""Folders of runs: at the recipe's learning rate, at those that are tried, at each configuration's best one."""
LEARNING_RATE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The sweep of ``--tune-lr``, as multiples of the recipe's learning rate."""


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study: ``runs/CONFIGURATION/seed-N``, and with tuned learning rates ``sweep`` and ``tuned``.

    Made by :meth:`at` to train in it, or by :meth:`open` to read it.

    corpus_fingerprint: of the study's tokens; None for a study that has not begun.
    study_file: absolute path of the user's file that defines the study; None for an installed study.
    """

    path: Path
    study_name: str
    preset_name: str
    preset: Preset
    corpus_fingerprint: str | None = None
    study_file: Path | None = None

    @classmethod
    def at(
        cls, path: Path, study_name: str, preset_name: str, preset: Preset, study_file: Path | None = None
    ) -> StudyFolder:
        """The existing folder of this study at ``path``, or a new one, which :meth:`claim` writes.

        More seeds and tuned learning rates can be added to an existing study; its sizes cannot change.

        Raises:
            InputError: the folder holds another study, or files that are no study.
        """
        if (path / STUDY_FILE).exists():
            found = cls.open(path)
            if found.study_name != study_name or _identity(found.preset) != _identity(preset):
                raise InputError(
                    f"{path} holds another study ({found.study_name}, preset {found.preset_name}, "
                    "with other options); give another folder with --out, or the same options"
                )
            return replace(found, study_file=study_file)
        check_unused(path, f"is no study folder ({STUDY_FILE} is missing)")
        return cls(path, study_name, preset_name, preset, study_file=study_file)

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
            name, preset_name, fingerprint = (
                str(content.pop(key)) for key in ("study", "preset", "corpus_fingerprint")
            )
            file = content.pop("study_file", None)
            preset = Preset.model_validate(content)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path / STUDY_FILE} is damaged ({error}); run the study in another folder") from error
        return cls(path, name, preset_name, preset, fingerprint, None if file is None else Path(str(file)))

    @property
    def reference(self) -> str:
        """The name by which another process finds the study (see :func:`normfree.runner.find_study`)."""
        return self.study_name if self.study_file is None else f"{self.study_file}:{self.study_name}"

    def prepare_data(self, cache_dir: Path) -> PackedData:
        """The study's tokens. An existing study keeps its original ones, though the corpus may change.

        Raises:
            InputError: the corpus cannot be used, or has changed and the study's tokens are no longer in the cache.
        """
        if self.corpus_fingerprint is None:
            return prepare_data(self.preset.data, cache_dir)
        return same_data(self.preset.data, cache_dir, self.corpus_fingerprint)

    def claim(self, data: PackedData) -> None:
        """Writes ``study.yaml``, unless it is there: the folder is this study's, and its corpus ``data``."""
        if (self.path / STUDY_FILE).exists() and StudyFolder.open(self.path).study_file == self.study_file:
            return
        content = {
            "study": self.study_name,
            **({} if self.study_file is None else {"study_file": str(self.study_file)}),
            "preset": self.preset_name,
            "corpus_fingerprint": data.fingerprint,
            **self.preset.model_dump(mode="json", exclude_none=True),
        }
        write_text(self.path / STUDY_FILE, yaml.safe_dump(content, sort_keys=False))

    @property
    def commands(self) -> list[str]:
        """The commands that began runs, each once, in the order of their first time.

        Raises:
            InputError: their file is damaged.
        """
        path = self.path / COMMANDS_FILE
        found = read_yaml(path).get("commands") if path.exists() else []
        if not isinstance(found, list):
            raise InputError(f"{path} is damaged; delete it: the report then names no command")
        return [str(each) for each in found]

    def keep_command(self, command: str) -> None:
        """Adds a command that begins runs to ``commands.yaml``."""
        commands = list(dict.fromkeys([*self.commands, *filter(None, [command])]))
        write_text(self.path / COMMANDS_FILE, yaml.safe_dump({"commands": commands}, width=float("inf")))

    def results(self, group: str) -> list[RunResult]:
        """The finished runs of one of :data:`GROUPS`, in no particular order."""
        return [load_result(path.parent) for path in sorted(self.path.glob(f"{group}/*/*/{RESULTS_FILE}"))]

    def best_learning_rates(self) -> dict[str, float]:
        """The learning rate with the lowest evaluation loss in the sweep, by configuration; none before it is whole.

        A configuration that diverged at every rate keeps the recipe's.
        """
        tried: dict[str, list[tuple[float, float]]] = {}
        fallback = (float("inf"), self.preset.recipe.learning_rate)
        for result in self.results("sweep"):
            label, loss, rate = (result.row[name] for name in ("configuration", EVAL_LOSS, "learning_rate"))
            tried.setdefault(label, []).append((loss, rate) if loss == loss else fallback)
        return {label: min(each)[1] for label, each in tried.items() if len(each) == len(LEARNING_RATE_FACTORS)}


def check_unused(path: Path, why: str) -> None:
    """Refuses a folder that holds other files.

    Raises:
        InputError: it does.
    """
    if path.exists() and (not path.is_dir() or not holds_nothing(path)):
        raise InputError(f"{path} exists and {why}; give another with --out")


def _identity(preset: Preset) -> dict[str, Any]:
    return preset.model_dump(mode="json", exclude={"seeds", "description", "caution", "columns"})
