"""Whatever is given, one line comes back, with an exit code of 0, 1 or 2, and nothing is written elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from normfree import cli
from normfree.errors import InputError, RunFailedError
from normfree.training.loop import Training
from tests.forked import normfree
from tests.nightly import NIGHTLY

from .crash import CHANGES, _writes, in_child

CASES = int(os.environ.get("FUZZ_CASES", 2500 if NIGHTLY else 20))
FUZZ = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=not NIGHTLY,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
ENOUGH = "enough: this case has come as far as its training"
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 5, 17, 64, 10**30]) | st.sampled_from(
    [float("nan"), float("inf"), -1.0, 0.0, 1e-3, 0.5, 1e300]
)
TEXTS = st.sampled_from(
    ["", "train", "gelu", "none", "../..", "~", "file:", "hf:", "directory:/proc/self/mem", "\0", "é"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


class _Writes:
    """The files that this process has opened to write, renamed, made or removed while it was watched."""

    watched = False
    paths: list[str] = []  # noqa: RUF012 - one hook for the whole process: it cannot be taken away again

    @classmethod
    def see(cls, event: str, arguments: tuple[object, ...]) -> None:
        if not cls.watched or not (event in CHANGES or (event == "open" and _writes(arguments))):
            return
        if isinstance(arguments[0], int):
            return  # a descriptor, such as a pipe's, gets a buffer: nothing is opened
        # What is removed with a whole tree is named from the folder it lies in.
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return
        cls.paths.append(str(Path.cwd() / str(arguments[0])))


sys.addaudithook(_Writes.see)


@contextlib.contextmanager
def writes() -> Iterator[list[str]]:
    _Writes.paths, _Writes.watched = [], True
    try:
        yield _Writes.paths
    finally:
        _Writes.watched = False


def assert_one_line(arguments: list[object], folder: Path) -> int:
    """Runs the command line in this process; it ends as it should, having written below ``folder`` only."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["normfree", *map(str, arguments)]
    try:
        with writes() as paths, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.argv = argv
    said = err.getvalue()
    assert code in (0, 1, 2), (code, said)
    assert "Traceback" not in said + out.getvalue()
    assert "normfree: failed (" not in said, said
    if code == 2:
        assert said.startswith("normfree: "), said
    # numpy and the system have places of their own; no name of a user leads there.
    elsewhere = [
        each for each in paths if not each.startswith((str(folder), "/dev/null")) and "__pycache__" not in each
    ]
    assert elsewhere == []
    return int(str(code))


@pytest.fixture(autouse=True)
def _stop_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any) -> None:
        raise RunFailedError(ENOUGH)

    monkeypatch.setattr(Training, "run", stop)


@pytest.fixture(scope="module")
def place(run_content: dict[str, Any]) -> Iterator[Path]:
    """A folder with a finished run and its cache."""
    folder = Path(tempfile.mkdtemp())
    (folder / "run.yaml").write_text(yaml.safe_dump(run_content))
    out = ("--out", folder / "run", "--cache-dir", folder / "cache")
    assert in_child(normfree("train", folder / "run.yaml", *out), folder).code == 0
    yield folder
    shutil.rmtree(folder)


def paths_in(content: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in content.items():
        found.append((*prefix, name))
        if isinstance(value, dict):
            found += paths_in(value, (*prefix, name))
    return found


@FUZZ
@given(data=st.data())
def test_configurations(data: st.DataObject, run_content: dict[str, Any], place: Path) -> None:
    content = yaml.safe_load(yaml.safe_dump(run_content))
    extra: list[tuple[str, ...]] = [
        ("model", name) for name in ("norm", "activation", "ffn", "attention", "norm_placement", "qk_norm", "x")
    ]
    extra += [("recipe", "tokens"), ("recipe", "on_nonfinite"), ("objective",), ("lora",), ("start_from",), ("y",)]
    for _ in range(data.draw(st.integers(1, 3))):
        *sections, name = data.draw(st.sampled_from([*paths_in(content), *extra]))
        section = content
        for each in sections:
            section = section.get(each) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = data.draw(VALUES)
    (place / "fuzz.yaml").write_text(yaml.safe_dump(content))
    shutil.rmtree(place / "out", ignore_errors=True)
    assert_one_line(["train", place / "fuzz.yaml", "--out", place / "out", "--cache-dir", place / "cache"], place)


@FUZZ
@example(text="!!python/object/apply:os.system ['true']")
@example(text="&a [*a]")
@example(text="model: &a {x: *a}")
@example(text="? [1, 2]\n: 3")
@given(text=st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"%@` \n#?ab01", max_size=40))
def test_yaml_files(text: str, place: Path) -> None:
    (place / "fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    for command in (["train", place / "fuzz.yaml"], ["study", "relu-revival", "--preset", place / "fuzz.yaml"]):
        shutil.rmtree(place / "out", ignore_errors=True)
        assert assert_one_line([*command, "--out", place / "out"], place) == 2
        assert not (place / "out").exists()


WORDS = st.sampled_from(
    [
        *("study", "train", "report", "verify", "remove-norm", "finetune", "entropy", "relu-revival", "nowhere"),
        *("--preset", "--out", "--json", "--seeds", "--tokens", "--steps", "--set", "--help", "--all", "--tune-lr"),
        *("--corpus", "--lora", "-1", "0,1", "model.n_layer=2", "recipe.steps=1", "data.corpus=x", "=", "pairs:x"),
        *("smoke", "cpu", "--"),
    ]
)


@FUZZ
@given(words=st.lists(WORDS | st.text(st.characters(exclude_characters="\0/"), max_size=6), max_size=7))
def test_arguments(words: list[str], place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def none(*_: Any, **__: Any) -> Any:
            raise InputError(ENOUGH)

        for module in ("runner.study_folder", "training.single_run", "removal.plan"):
            for name in ("prepare_data", "same_data"):
                patch.setattr(f"normfree.{module}.{name}", none)
        patch.setattr("normfree.training.finetuning.prepare_data", none)
        (place / "here").mkdir(exist_ok=True)
        patch.chdir(place / "here")
        assert_one_line(list(words), place)


@FUZZ
@given(data=st.data())
def test_damaged_files_of_a_run(data: st.DataObject, place: Path) -> None:
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "run", folder / "run")
    shutil.copytree(place / "cache", folder / "cache")
    if data.draw(st.booleans()):
        (folder / "run" / "results.csv").unlink()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(files))
        content = path.read_bytes() if path.exists() else b""
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        path.unlink(missing_ok=True)
        kind = data.draw(st.sampled_from(["remove", "truncate", "replace", "flip", "insert"]))
        some = data.draw(st.binary(max_size=20))
        if kind != "remove":
            flipped = content[:at] + bytes([content[at] ^ 1 if content else 0]) + content[at + 1 :]
            inserted = content[:at] + some + content[at:]
            path.write_bytes({"truncate": content[:at], "replace": some, "flip": flipped}.get(kind, inserted))
    cache = ["--cache-dir", folder / "cache"]
    assert_one_line(["verify", folder / "run", "--no-evaluate"], place)
    assert_one_line(["train", place / "run.yaml", "--out", folder / "run", *cache], place)
