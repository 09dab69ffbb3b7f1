"""The pages of depth and interpret quote the whole command, as it was given."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from normfree.cli import app
from normfree.errors import RunFailedError

Command = Callable[..., tuple[int, str, str]]
VALUES = {
    **{"sequences": "3", "sequence_length": "16", "probes": "2", "batch_size": "2", "neurons": "4"},
    **{"corpus": "installed-python", "tokenizer": "o/name", "device": "cpu", "dtype": "fp32", "revision": "ma in"},
    **{"prompts": "it's.jsonl", "out": "else where", "cache_dir": "tokens", "bos": None, "json_": None},
}
"""A value for each option of the two commands; None for those without one."""


class Found:
    """What was found of models, whose page is all that is looked at."""

    def write(self, folder: Path, command: str) -> NoReturn:
        raise RunFailedError(command)


@pytest.mark.parametrize(("command", "function"), [("depth", "depth"), ("interpret", "interpretability")])
def test_every_option_is_in_the_command(
    normfree: Command, monkeypatch: pytest.MonkeyPatch, command: str, function: str
) -> None:
    monkeypatch.setattr(f"normfree.interpret.compare_{function}", lambda *_, **__: Found())
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    words = [command, "o/model"]
    for each in parameters:
        if each.name != "models":
            value = VALUES[each.name]
            words += [each.opts[0]] if value is None else [each.opts[0], value]
    code, _, err = normfree(*words)
    assert (code, err) == (1, f"normfree: {shlex.join(['normfree', *words])}\n")
