"""Finds studies and collections by name: those of installed packages, and those in a user's own file.

An installed package declares where its studies are by an entry point of the group ``normfree.studies``, which names a
package, a module or a study. A module declares its studies as ``STUDY`` (one) or ``STUDIES`` (several); of a package,
all modules and packages in it are searched. A new study in a declared package is therefore one new file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import SourceLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from normfree.errors import InputError, unknown_name
from normfree.runner.study import Collection, Study
from normfree.runner.study_folder import StudyFolder

GROUP = "normfree.studies"
BUILT_IN = EntryPoint(name="normfree", value="normfree.studies", group=GROUP)
"""Found even where the metadata of an installation from source is older than the entry point."""
PACKAGE_FILE, STUDY_MODULE = "__init__.py", "study.py"
SEPARATORS = ("/", "\\")

AnyStudy = Study | Collection


@dataclass(frozen=True)
class Found:
    """A study or collection, and the absolute path of the user's file that defines it; None for an installed one."""

    study: AnyStudy
    file: Path | None = None


def installed_studies() -> dict[str, AnyStudy]:
    """Studies and collections of all installed packages, by name; the built-in ones first.

    What a package other than this one cannot load is left out with a warning.
    """
    found: dict[str, AnyStudy] = {}
    for _, study in _installed():
        found.setdefault(study.name, study)
    return found


def find_study(reference: str | Path) -> Found:
    """The study or collection with a name, or in a file.

    A file is given by its path (``./my_study.py``, or a folder with an ``__init__.py`` or a ``study.py``), with
    ``:NAME`` behind it where it defines several studies. Its code is run. A string without a path separator that does
    not end with ``.py`` is a name.

    Raises:
        InputError: there is no such study, two packages have one of this name, or the file cannot be used.
    """
    path, name = _path_and_name(reference)
    if path is not None:
        file, studies = _in_file(path)
        if name and name not in studies:
            raise unknown_name(f"study of {path}", name, studies)
        if not name and len(studies) > 1:
            listed = ", ".join(studies)
            raise InputError(f"{path} defines several studies ({listed}); name one, as {path}:{min(studies)}")
        return Found(studies[name or min(studies)], file)
    found = [(entry, study) for entry, study in _installed() if study.name == name]
    if not found:
        raise unknown_name("study", name, installed_studies())
    if len(found) > 1:
        packages = ", ".join(entry.value for entry, _ in found)
        raise InputError(f"several installed packages have a study {name!r} ({packages}); uninstall all but one")
    return Found(found[0][1])


def studies_for(path: Path, file: object, reference: str | Path | None) -> dict[str, AnyStudy]:
    """The studies among which is that of the folder ``path``, which says that ``file`` (None: a package) defines it.

    Code is never run because a folder names it, for a folder may come from anybody: the ``reference`` has to name it.

    Raises:
        InputError: a file defines the study, and it is not given or cannot be used.
    """
    if file is not None and reference is None:
        raise InputError(
            f"{path} holds a study that is defined in {file}; code is not run because a folder names it: "
            f"give the file yourself, with --study {shlex.quote(str(file))}"
        )
    where = None if reference is None else _path_and_name(reference)[0]
    return installed_studies() if where is None else _in_file(where)[1]


def study_of(folder: StudyFolder, studies: Mapping[str, AnyStudy]) -> Study:
    """The study of a folder.

    Raises:
        InputError: it is not among ``studies``.
    """
    study = studies.get(folder.study_name)
    if not isinstance(study, Study):
        names = [name for name, each in studies.items() if isinstance(each, Study)]
        raise unknown_name("study", folder.study_name, names)
    return study


def _path_and_name(reference: str | Path) -> tuple[Path | None, str]:
    """The file that ``reference`` names, None if it names none, and the study's name, empty if there is none."""
    text = str(reference)
    path, _, name = text.rpartition(":")
    if not path or any(each in name for each in SEPARATORS) or Path(text).exists():
        path, name = text, ""
    if isinstance(reference, Path) or path.endswith(".py") or any(each in path for each in SEPARATORS):
        return Path(path), name
    return None, text


def _installed() -> Iterator[tuple[EntryPoint, AnyStudy]]:
    """Each study once, with the entry point that names it."""
    entries = list(entry_points(group=GROUP))
    others = [entry for entry in entries if entry.value != BUILT_IN.value]
    for entry in (BUILT_IN, *others):
        try:
            studies = list(_declared(entry.load(), entry.value))
        except Exception as error:  # foreign code may raise anything, and must not take the other studies with it
            if entry is BUILT_IN:
                raise
            logging.getLogger("normfree").warning(
                "the studies of %s cannot be loaded (%s: %s)", entry.value, type(error).__name__, error
            )
            continue
        yield from ((entry, study) for study in studies)


def _declared(found: object, where: str) -> Iterable[AnyStudy]:
    """The studies of a package, a module, or the study that an entry point names itself."""
    if not isinstance(found, ModuleType):
        return _checked([found], where)
    declared = [
        study
        for module in _modules(found)
        for study in (*([module.STUDY] if hasattr(module, "STUDY") else []), *getattr(module, "STUDIES", ()))
    ]
    unique = {id(study): study for study in declared}
    return _checked(unique.values(), where)


def _modules(found: ModuleType) -> Iterator[ModuleType]:
    """A module, and of a package all modules and packages in it."""
    yield found
    if hasattr(found, "__path__") and Path(str(found.__file__)).name == PACKAGE_FILE:
        for each in pkgutil.iter_modules(found.__path__):
            if not each.name.startswith("_"):
                yield from _modules(importlib.import_module(f"{found.__name__}.{each.name}"))


def _checked(declared: Iterable[object], where: str) -> list[AnyStudy]:
    studies: list[AnyStudy] = []
    for each in declared:
        if not isinstance(each, Study | Collection):
            raise InputError(f"{where}: {each!r} is no Study and no Collection of normfree.runner")
        if each.name in {study.name for study in studies}:
            raise InputError(f"{where}: two studies are named {each.name!r}; rename one")
        studies.append(each)
    return studies


def _in_file(path: Path) -> tuple[Path, dict[str, AnyStudy]]:
    """The absolute path of a file or folder, and the studies that it defines, by name."""
    file = path.resolve()
    try:
        studies = {study.name: study for study in _declared(_run(file, path), str(path))}
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{_place(error, file)}: {type(error).__name__}: {error}") from error
    taken = sorted(studies.keys() & {study.name for _, study in _installed()})
    if taken:
        raise InputError(f"{path}: an installed study is named {taken[0]!r} already; give this one another name")
    if not studies:
        raise InputError(f"{path} defines no study; set STUDY = normfree.runner.Study(...) in it, or STUDIES = (...)")
    return file, studies


def _run(file: Path, given: Path) -> ModuleType:
    """Runs the module or package at ``file``: anew each time, and from its source, so that a notebook sees an edit.

    Raises:
        InputError: there is no such file, or it is no Python source.
        Exception: what its code raises.
    """
    source = file
    if file.is_dir():
        source = next((file / each for each in (PACKAGE_FILE, STUDY_MODULE) if (file / each).exists()), file)
    if not source.is_file():
        what = f"it holds neither {PACKAGE_FILE} nor {STUDY_MODULE}" if file.is_dir() else "there is no such file"
        raise InputError(f"cannot read the study {given}: {what}")
    name = f"normfree_study_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    folders = [str(file)] if file.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=folders)
    if spec is None or not isinstance(spec.loader, SourceLoader):
        raise InputError(f"cannot read the study {given}: it is no Python source file (.py)")
    for former in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        del sys.modules[former]
    importlib.invalidate_caches()
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(spec.loader.source_to_code(source.read_bytes(), str(source)), vars(module))
    return module


def _place(error: Exception, file: Path) -> str:
    """The line of the user's code that raised an exception."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if Path(each.filename) == file or file in Path(each.filename).parents]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else str(file)
