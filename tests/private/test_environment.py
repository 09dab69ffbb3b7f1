"""An environment that is missing or wrong: one line, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from normfree.errors import InputError
from normfree_private.environment import ENGINE_FOLDER, find_engine

Command = Callable[..., tuple[int, str, str]]


def fake_python(path: Path, answer: str, code: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\n{answer}\nexit {code}\n")
    path.chmod(0o755)
    return path


def test_the_engine_is_found_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = fake_python(tmp_path / "python", """echo '{"spu": "0.9.5"}'""")
    engine = find_engine(named)
    assert (engine.python, engine.version) == (named, "0.9.5")
    assert engine.command("party.py", "folder", 1) == [str(named), str(ENGINE_FOLDER / "party.py"), "folder", "1"]
    monkeypatch.setenv("NORMFREE_ENGINE_PYTHON", str(named))
    assert find_engine().python == named
    monkeypatch.delenv("NORMFREE_ENGINE_PYTHON")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv-private" / "bin").mkdir(parents=True)
    there = named.rename(tmp_path / ".venv-private" / "bin" / "python")
    assert find_engine().python == there


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ("""echo '{"spu": "0.9.4"}'""", 0, "has SPU 0.9.4, but costs are measured with 0.9.5; run `make private`"),
        ("echo hello", 0, "does not answer like the engine's Python"),
        ("echo 'first'; echo 'no module named spu' >&2", 1, r"no Python that has the engine \(no module named spu\)"),
    ],
)
def test_a_wrong_environment(tmp_path: Path, answer: str, code: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_engine(fake_python(tmp_path / "python", answer, code))


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text("text")
    with pytest.raises(InputError, match="no Python that has the engine"):
        find_engine(path)


def test_the_command_line_says_it_in_one_line(normfree: Command, tmp_path: Path) -> None:
    code, out, err = normfree("private-cost", "cpu", "--engine-python", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "nowhere does not exist; run `make private` (it needs Python 3.10 or 3.11)" in err
    code, _, err = normfree("private-cost", "cpu", "--engine-python", sys.executable)
    assert code == 2
    assert err.count("\n") == 1
    assert "No module named" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu", "--protocol", "semi3k"], "unknown protocol 'semi3k' (did you mean 'semi2k'?)"),
        (["cpu", "--field", "fm32"], "unknown field 'fm32'"),
        (["cpu", "--fraction-bits", "40"], "fraction bits 40 leave no room in fm64; give 1 to 31"),
        (["cpu", "--network", "fast"], "not of the form NAME=MBIT_PER_SECOND,DELAY_MS"),
        (["paper-gpt2-128"], "give its size with --vocab-size"),
        (["cpu", "cpu.yaml"], "there is no file or folder 'cpu.yaml'"),
        (["cpu", "--end-to-end"], "is a configuration without weights"),
    ],
)
def test_bad_options(normfree: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    python = fake_python(tmp_path / "python", """echo '{"spu": "0.9.5"}'""")
    code, _, err = normfree("private-cost", *arguments, "--engine-python", python)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err
