"""Begins studies and collections, and opens their folders."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from normfree.errors import InputError, unknown_name
from normfree.runner.catalog import AnyStudy, Found, studies_where
from normfree.runner.collection import COLLECTION_FILE, Collection, CollectionFolder
from normfree.runner.page import StudyPage
from normfree.runner.presets import Preset, load_preset
from normfree.runner.study import STUDY_FILE, Study, StudyFolder
from normfree.training.configuration import read_yaml


def begin(
    found: Found, path: Path, preset_name: str, changed: Callable[[Preset], Preset]
) -> StudyPage | CollectionFolder:
    """A study or collection at ``path``: the one that is there, or a new one.

    Raises:
        InputError: the preset is unknown, or the folder holds something else.
    """
    study = found.study
    if isinstance(study, Collection):
        return CollectionFolder.at(path, study, preset_name, changed, found.file)
    preset = changed(load_preset(preset_name))
    return StudyPage(study, StudyFolder.at(path, study, Path(preset_name).stem, preset, found.file))


def open_folder(path: Path, reference: str | Path | None = None) -> StudyPage | CollectionFolder:
    """The study or collection in ``path``, to read what is there.

    A folder of an installed study says which it is. It also says which file its study comes from, but code is never
    run because a folder names it: a folder may come from anybody. That file has to be given as the ``reference``.

    Raises:
        InputError: there is no study, it is unknown or of a file that is not given, or none of its studies has begun.
    """
    if (path / COLLECTION_FILE).exists():
        content = read_yaml(path / COLLECTION_FILE)
        studies = _studies(path, content.get("study_file"), reference)
        collection = studies.get(str(content.get("collection")))
        if not isinstance(collection, Collection):
            every = [name for name, each in studies.items() if isinstance(each, Collection)]
            raise unknown_name("collection", content.get("collection"), every)
        members = [path / _member(path, str(each)) for each in content.get("members", [])]
        pages = [_page(StudyFolder.open(each), studies) for each in members if (each / STUDY_FILE).exists()]
        if pages:
            return CollectionFolder(path, collection, pages)
    folder = StudyFolder.open(path)
    return _page(folder, _studies(path, folder.study_file, reference))


def _studies(path: Path, file: object, reference: str | Path | None) -> dict[str, AnyStudy]:
    """The studies among which is that of the folder ``path``, which says that it comes from ``file``."""
    if file is not None and reference is None:
        raise InputError(
            f"{path} holds a study that is defined in {file}; code is not run because a folder names it: "
            f"give the file yourself, with --study {shlex.quote(str(file))}"
        )
    return studies_where(reference)


def _member(path: Path, name: str) -> str:
    """The name of a folder in a collection, which is to be written into."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise InputError(f"{path / COLLECTION_FILE}: the member {name!r} names no folder in it; restore the file")
    return name


def _page(folder: StudyFolder, studies: Mapping[str, AnyStudy]) -> StudyPage:
    study = studies.get(folder.study_name)
    if not isinstance(study, Study):
        every = [name for name, each in studies.items() if isinstance(each, Study)]
        raise unknown_name("study", folder.study_name, every)
    return StudyPage(study, folder)
