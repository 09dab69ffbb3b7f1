"""``--verbose``, before the command or among its options, and the list of commands."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from normfree.cli import COMMANDS
from normfree.cli.verbose import OTHERS, is_verbose
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM

Normfree = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    NormfreeForCausalLM(NormfreeConfig(vocab_size=9, n_layer=2, n_head=1, n_embd=8)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("place", [0, 1, 2, -1])
def test_verbose_says_versions_and_what_is_loaded(place: int, normfree: Normfree, model: Path, tmp_path: Path) -> None:
    levels = [logging.getLogger(name).level for name in OTHERS]
    words = ["prune-layers", model, "--drop", "1", "--out", tmp_path / "out"]
    words.insert(place % len(words) if place >= 0 else len(words), "--verbose")
    code, _, error = normfree(*words)
    assert code == 0, error
    assert "normfree: normfree 0." in error
    assert f"normfree: loaded {model} as fp32 on cpu, " in error
    assert not is_verbose()
    assert logging.getLogger("normfree").level == logging.NOTSET
    assert [logging.getLogger(name).level for name in OTHERS] == levels


def test_without_it_nothing_is_said(normfree: Normfree, model: Path, tmp_path: Path) -> None:
    assert normfree("prune-layers", model, "--drop", "1", "--out", tmp_path / "out")[::2] == (0, "")


def test_unexpected_errors_show_where_they_were_raised(
    normfree: Normfree, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("for a test")

    monkeypatch.setattr("normfree.exports.export_without_layers", fail)
    words = ("prune-layers", model, "--drop", "1", "--out", "out")
    assert "Traceback" not in normfree(*words)[2]
    code, _, error = normfree(*words, "--verbose")
    assert code == 1
    assert "Traceback" in error


def test_the_list_of_commands_cuts_no_line(normfree: Normfree) -> None:
    code, out, _ = normfree("--help")
    assert code == 0
    listed = " ".join(out.partition("Commands:")[2].split())
    for command, line in COMMANDS.items():
        assert f"{command.__name__.replace('_', '-')} {line}" in listed
    assert "..." not in listed
