"""Where studies are found: installed packages, and files of a user's own, which nothing but the user names."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import yaml

import normfree
import normfree.studies
from normfree.errors import InputError
from normfree.runner import catalog, find_study, installed_studies
from normfree.studies.relu_revival import STUDY as RELU_REVIVAL

Command = Callable[..., tuple[int, str, str]]

SOURCE = '''
"""Where the norm is."""
from normfree.runner import Configuration, Findings, Study

def describe(page):
    return Findings("Lead: " + ", ".join(page.table["configuration"]) + ".", [], "Limits.")

STUDY = Study(
    name="my-study",
    title="Mine",
    baseline="pre",
    configurations=lambda preset: (
        Configuration("pre", {"norm": "layernorm"}),
        Configuration("post", {"norm": "layernorm", "norm_placement": "post"}),
    ),
    describe=describe,
)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_study.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """The entry points of other packages, to be added to."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(catalog, "entry_points", lambda group: found)
    return found


def test_every_module_of_the_package_that_declares_a_study_is_found() -> None:
    root = Path(normfree.studies.__file__).parent
    declaring = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in root.rglob("*.py")
        if any(f"\n{name}" in path.read_text() for name in ("STUDY =", "STUDIES ="))
    }
    assert {"relu_revival", "paper"} <= declaring
    modules = [sys.modules[f"normfree.studies.{name}"] for name in declaring if find_study("relu-revival")]
    declared = {id(each) for module in modules for each in getattr(module, "STUDIES", [getattr(module, "STUDY", None)])}
    assert {id(each) for each in installed_studies().values()} == declared
    assert find_study("relu-revival") == catalog.Found(RELU_REVIVAL)
    assert {"spark", "spark-norms", "table-2", "relu-revival-all", "scaling"} <= installed_studies().keys()


def test_built_in_studies_use_what_a_study_of_a_users_own_can_use() -> None:
    inside = re.compile(r"^\s*(from|import) normfree\.runner\.", re.MULTILINE)
    sources = [*Path(normfree.studies.__file__).parent.rglob("*.py")]
    assert len(sources) > 15
    assert [path.name for path in sources if inside.search(path.read_text())] == []


def test_a_package_adds_studies_by_an_entry_point(
    entries: list[EntryPoint], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = installed_studies()
    package = file.parent / "their_studies"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine").mkdir()
    (package / "mine" / "__init__.py").write_text("")
    (package / "mine" / "study.py").write_text(SOURCE)
    (package / "two.py").write_text(
        SOURCE.replace("my-study", "b") + "from dataclasses import replace\nSTUDIES = (STUDY, replace(STUDY, name='c'))"
    )
    monkeypatch.syspath_prepend(str(file.parent))
    entries.append(EntryPoint("theirs", "their_studies", catalog.GROUP))
    assert list(installed_studies()) == [*before, "my-study", "b", "c"]
    entries[:] = [EntryPoint("theirs", "their_studies.mine.study", catalog.GROUP)]
    assert list(installed_studies()) == [*before, "my-study"]
    entries[:] = [EntryPoint("theirs", "their_studies.mine.study:STUDY", catalog.GROUP)]
    assert find_study("my-study").study.title == "Mine"


def test_a_package_that_cannot_be_loaded_takes_no_other_study_with_it(
    entries: list[EntryPoint], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries.append(EntryPoint("theirs", "no_such_package.studies", catalog.GROUP))
    assert find_study("relu-revival").study is RELU_REVIVAL
    assert "no_such_package.studies cannot be loaded (ModuleNotFoundError" in caplog.text
    theirs = ModuleType("theirs")
    theirs.STUDIES = ["relu-revival"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    entries[:] = [EntryPoint("theirs", "theirs", catalog.GROUP)]
    assert find_study("relu-revival").study is RELU_REVIVAL
    assert "'relu-revival' is no Study and no Collection" in caplog.text


def test_a_name_that_two_packages_have_is_refused(
    entries: list[EntryPoint], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "their_study.py").write_text(SOURCE.replace("my-study", "relu-revival"))
    monkeypatch.syspath_prepend(str(file.parent))
    entries.append(EntryPoint("theirs", "their_study", catalog.GROUP))
    with pytest.raises(InputError, match=r"a study 'relu-revival' \(normfree.studies, their_study\); uninstall"):
        find_study("relu-revival")
    assert find_study("spark").study.name == "spark"


@pytest.mark.parametrize("kind", ["file", "package", "folder", "several"])
def test_a_file_or_folder_holds_a_study(file: Path, kind: str) -> None:
    reference: str | Path = file
    if kind == "package":
        (file.parent / "mine").mkdir()
        (file.parent / "mine" / "__init__.py").write_text("")
        file.rename(file.parent / "mine" / "norms.py")
        reference = str(file.parent / "mine")
    if kind == "folder":
        (file.parent / "mine").mkdir()
        (file.parent / "mine" / "title.py").write_text("TITLE = 'Mine'")
        (file.parent / "mine" / "study.py").write_text("from .title import TITLE" + SOURCE.replace('"Mine"', "TITLE"))
        reference = file.parent / "mine"
    if kind == "several":
        file.write_text(
            SOURCE + "from dataclasses import replace\nSTUDIES = (STUDY, replace(STUDY, name='b', title='B'))"
        )
        with pytest.raises(InputError, match=r"defines several studies \(my-study, b\); name one, as .*my_study.py:b"):
            find_study(file)
        reference = f"{file}:my-study"
    found = find_study(reference)
    assert (found.study.name, found.study.title) == ("my-study", "Mine")
    assert found.file == Path(str(reference).removesuffix(":my-study")).resolve()


def test_an_edited_file_is_read_again(file: Path) -> None:
    assert find_study(file).study.title == "Mine"
    file.write_text(SOURCE.replace('"Mine"', '"Ours"'))  # as many bytes, within a second
    assert find_study(file).study.title == "Ours"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("x = 1", "my_study.py defines no study; set STUDY = normfree.runner.Study(...)"),
        ("\nx = y", "my_study.py, line 2: NameError: name 'y' is not defined"),
        ("\n\nx = (", "my_study.py, line 3: SyntaxError: "),
        ("import no_such_module", "my_study.py, line 1: ModuleNotFoundError"),
        ("STUDY = 3", "3 is no Study and no Collection of normfree.runner"),
        (SOURCE.replace("my-study", "relu-revival"), "an installed study is named 'relu-revival' already"),
        (SOURCE.replace("my-study", "../mine"), "the name of a study has letters, digits"),
        (SOURCE + "\nimport copy\nSTUDIES = (STUDY, copy.copy(STUDY))", "two studies are named 'my-study'"),
        (None, "my_study.py: there is no such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(
    normfree: Command, file: Path, content: str | None, says: str
) -> None:
    file.unlink()
    if content is not None:
        file.write_text(content)
    code, out, err = normfree("study", "./my_study.py")
    assert code == 2, out
    assert says in err
    assert err.count("\n") == 1
    assert not (file.parent / "studies").exists()


def test_references_that_name_nothing(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InputError, match="unknown study 'my_study'"):
        find_study("my_study")
    with pytest.raises(InputError, match=r"it holds neither __init__.py nor study.py"):
        find_study(tmp_path)
    with pytest.raises(InputError, match=r"unknown study of .*my_study.py 'mine'.*allowed: my-study"):
        find_study(f"{file}:mine")
    (tmp_path / "study.txt").write_text(SOURCE)
    with pytest.raises(InputError, match="no Python source file"):
        find_study(tmp_path / "study.txt")


def test_a_study_of_a_file_is_trained_shown_and_moved(
    normfree: Command, preset_file: Path, file: Path, tmp_path: Path
) -> None:
    command = ("study", "./my_study.py", "--preset", preset_file, "--steps", 2)
    code, _, err = normfree(*command)
    assert code == 0, err
    folder = tmp_path / "studies" / "my-study-tiny"
    content = yaml.safe_load((folder / "study.yaml").read_text())
    assert (content["study"], content["study_file"]) == ("my-study", str(file))
    assert pd.read_csv(folder / "results.csv")["configuration"].tolist() == ["pre", "post"]
    assert "Lead: pre, post." in (folder / "report.html").read_text()
    assert (
        f"normfree study {file}:my-study --preset {preset_file} --out studies/my-study-tiny"
        in (folder / "report.html").read_text()
    )

    with pytest.raises(InputError, match=rf"is defined in {file}; code is not run because a folder names it"):
        normfree_load(folder)
    assert len(normfree_load(folder, file).table) == 2
    code, _, err = normfree("report", folder)
    assert (code, f"--study {file}" in err, err.count("\n")) == (2, True, 1)
    moved = shutil.move(file, tmp_path / "elsewhere.py")
    code, _, err = normfree("report", folder, "--study", file)
    assert (code, "there is no such file" in err) == (2, True)
    code, _, err = normfree("report", folder, "--study", moved)
    assert code == 0, err
    code, _, err = normfree("study", "./elsewhere.py", "--preset", preset_file, "--steps", 2)
    assert code == 0, err
    assert yaml.safe_load((folder / "study.yaml").read_text())["study_file"] == str(moved)
    code, _, err = normfree("report", folder, "--study", "relu-revival")
    assert (code, "unknown study 'my-study'" in err) == (2, True)


def test_a_worker_finds_the_study_of_a_file(normfree: Command, preset_file: Path, file: Path, tmp_path: Path) -> None:
    """In a process of its own, which starts in another folder."""
    command = ("study", "./my_study.py", "--preset", preset_file, "--steps", 2, "--out", "study")
    code, out, err = normfree(*command, "--only", "pre", "--workers", 1, "--executor-set", "cpus=1")
    assert code == 0, out + err
    assert out.count(": finished on ") == 1
    assert normfree_load(tmp_path / "study", str(file)).table["configuration"].tolist() == ["pre"]


def test_a_helper_is_given_the_file_of_the_study(normfree: Command, preset_file: Path, file: Path) -> None:
    assert normfree("study", "./my_study.py", "--preset", preset_file, "--steps", 2, "--out", "study")[0] == 0
    code, _, err = normfree("study-worker", "study")
    assert (code, "code is not run because a folder names it" in err) == (2, True)
    code, _, err = normfree("study-worker", "study", "--study", "./my_study.py")
    assert (code, "nobody is training the study" in err) == (2, True)


def normfree_load(path: Path, study: str | Path | None = None) -> normfree.StudyResult:
    return normfree.load_study(path, study)
