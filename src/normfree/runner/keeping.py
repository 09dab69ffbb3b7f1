"""A study without its checkpoints: what its report is made of, small enough for a repository."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from normfree.errors import InputError
from normfree.files import folder_written_whole, write_text
from normfree.removal.layout import REMOVAL_FILE
from normfree.runner.opening import OpenCollection, open_folder
from normfree.runner.study_folder import COLLECTION_FILE, GROUPS, STUDY_FILE, StudyFolder
from normfree.training.records import METRICS_FILE
from normfree.training.run_folder import CONFIG_FILE, RESULTS_FILE

KEPT = ("*.csv", "*.parquet", "*.yaml")
"""Files of a run that reports read: tables, telemetry, options. Weights and the state of training are left out."""
KEPT_OF_OTHERS = (METRICS_FILE, REMOVAL_FILE)
"""Of runs in its folder, such as those of a removal, whose own tables are beside them."""


def keep_tables(folder: Path, to: Path, study: str | Path | None = None) -> int:
    """Copies what the report of the study or collection in ``folder`` is made of to ``to``; returns how many runs.

    Only finished runs, without checkpoints: a few ten kilobytes each. ``to`` is a study folder too: ``normfree report``
    makes its report, and in a copy of it ``normfree study`` trains more runs. Runs that it holds already stay as they
    are.

    Args:
        study: the user's file that defines the study (see :func:`normfree.runner.load_study`).

    Raises:
        InputError: there is no study, or ``to`` holds another one, or the same one on another corpus.
    """
    opened = open_folder(folder, study)
    is_collection = isinstance(opened, OpenCollection)
    places = {each.path: to / each.path.name if is_collection else to for each in opened.members}
    for each in opened.members:
        _check_same(each.folder, places[each.path])
    if is_collection:
        write_text(to / COLLECTION_FILE, (folder / COLLECTION_FILE).read_text(encoding="utf-8"))
    return sum(_keep_study(each.folder, places[each.path]) for each in opened.members)


def _check_same(study: StudyFolder, to: Path) -> None:
    kept = StudyFolder.at(to, study.study_name, study.preset_name, study.preset, study.study_file)
    if kept.corpus_fingerprint not in (None, study.corpus_fingerprint):
        raise InputError(f"{to} holds the same study on another corpus; give another folder with --keep")


def _keep_study(study: StudyFolder, to: Path) -> int:
    write_text(to / STUDY_FILE, (study.path / STUDY_FILE).read_text(encoding="utf-8"))
    kept = StudyFolder.open(to)
    for command in study.commands:
        kept.keep_command(command)
    finished = [path.parent for group in GROUPS for path in sorted(study.path.glob(f"{group}/*/*/{RESULTS_FILE}"))]
    new = [run for run in finished if not (to / run.relative_to(study.path)).exists()]
    for run in new:
        with folder_written_whole(to / run.relative_to(study.path)) as temporary:
            shutil.copytree(run, temporary, dirs_exist_ok=True, ignore=_ignored_in(run))
    return len(new)


def _ignored_in(run: Path) -> Callable[[str, list[str]], set[str]]:
    """Checkpoints, exported models, and files that no report reads, for ``shutil.copytree``."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        is_other = CONFIG_FILE in names and Path(folder) != run
        kinds = KEPT_OF_OTHERS if is_other else KEPT
        return {
            name
            for name in names
            if name.startswith("checkpoint-")
            or ((Path(folder) / name).is_file() and not any(Path(name).match(kind) for kind in kinds))
        }

    return ignored
