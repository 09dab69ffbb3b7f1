"""Every study and collection by name, and opening their folders.

A new one is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from normfree.errors import InputError, unknown_name
from normfree.runner.collection import COLLECTION_FILE, CollectionFolder
from normfree.runner.page import StudyPage
from normfree.runner.presets import Preset, load_preset
from normfree.runner.study import STUDY_FILE, StudyFolder
from normfree.studies import (
    curse_of_depth,
    distillation,
    entropy_regularization,
    hybrid_activations,
    learnable_slopes,
    negative_slope,
    norm_removal,
    norm_removal_scaling,
    outliers,
    paper,
    relu_revival,
    scaling,
    spark,
)
from normfree.training.configuration import read_yaml

STUDIES = {
    study.name: study
    for study in (
        relu_revival.STUDY,
        learnable_slopes.STUDY,
        negative_slope.STUDY,
        outliers.STUDY,
        hybrid_activations.STUDY,
        entropy_regularization.STUDY,
        distillation.STUDY,
        norm_removal.STUDY,
        norm_removal_scaling.STUDY,
        curse_of_depth.STUDY,
        spark.STUDY,
        spark.CURVE,
        spark.NORMS,
        paper.FIGURES,
        scaling.SIZES,
        scaling.CONTEXT,
    )
}
COLLECTIONS = {collection.name: collection for collection in (paper.TABLE_2, paper.EVERYTHING, scaling.SCALING)}


def begin(name: str, path: Path, preset_name: str, changed: Callable[[Preset], Preset]) -> StudyPage | CollectionFolder:
    """The study or collection ``name`` at ``path``: the one that is there, or a new one.

    Raises:
        InputError: the name or the preset is unknown, or the folder holds something else.
    """
    if name in COLLECTIONS:
        return CollectionFolder.at(path, COLLECTIONS[name], preset_name, changed)
    if name not in STUDIES:
        raise unknown_name("study", name, [*STUDIES, *COLLECTIONS])
    study, stem = STUDIES[name], Path(preset_name).stem
    return StudyPage(study, StudyFolder.at(path, study, stem, changed(load_preset(preset_name))))


def open_folder(path: Path) -> StudyPage | CollectionFolder:
    """The study or collection in ``path``, to read what is there.

    Raises:
        InputError: there is none, it is unknown, or none of its studies has begun.
    """
    if (path / COLLECTION_FILE).exists():
        content = read_yaml(path / COLLECTION_FILE)
        name = str(content.get("collection"))
        if name not in COLLECTIONS:
            raise unknown_name("collection", name, COLLECTIONS)
        members = [path / _member(path, str(each)) for each in content.get("members", [])]
        pages = [_open_study(each) for each in members if (each / STUDY_FILE).exists()]
        if pages:
            return CollectionFolder(path, COLLECTIONS[name], pages)
    return _open_study(path)


def _member(path: Path, name: str) -> str:
    """The name of a folder in a collection, which is to be written into."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise InputError(f"{path / COLLECTION_FILE}: the member {name!r} names no folder in it; restore the file")
    return name


def _open_study(path: Path) -> StudyPage:
    folder = StudyFolder.open(path)
    if folder.study_name not in STUDIES:
        raise unknown_name("study", folder.study_name, STUDIES)
    return StudyPage(STUDIES[folder.study_name], folder)
