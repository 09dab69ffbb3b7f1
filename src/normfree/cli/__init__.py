"""The command line: ``normfree COMMAND``. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted.

A new command is one file with one function, and its name in ``COMMANDS``.
"""

from __future__ import annotations

import os
import sys

import typer

from normfree.cli.entropy import entropy
from normfree.cli.interpret import interpret
from normfree.cli.remove_norm import remove_norm
from normfree.cli.report import report
from normfree.cli.study import study
from normfree.cli.train import train
from normfree.errors import InputError

# A study never needs the hub unless it names a corpus or a tokenizer there; nor does it ever report usage to it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Deterministic matrix products on CUDA need this set before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

INTERRUPTED = 130
COMMANDS = (study, train, entropy, remove_norm, interpret, report)

app = typer.Typer(
    name="normfree",
    help="What normalization, activation functions and sparsity do to a transformer language model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in COMMANDS:
    app.command(_command.__name__.replace("_", "-"))(_command)


def main() -> None:
    """Runs the command line, turning bad input into one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except typer.TyperException as error:
        _fail(f"{error.format_message()} (see: normfree --help)", 2)
    if code == INTERRUPTED:
        _fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"normfree: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
