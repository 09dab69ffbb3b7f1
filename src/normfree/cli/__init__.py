"""The command line: ``normfree COMMAND``.

Exit codes: 0 done, 1 the run failed or what was checked does not hold, 2 bad input, 128 + N stopped by signal N (130
Ctrl-C, 143 SIGTERM).

A new command is one file with one function, which declares options, calls one library function and prints what it
returns; and its line in ``COMMANDS``. A group of commands is one file with a Typer, added below them. A plug-in adds a
command without touching this package (:mod:`normfree.cli.plugins`).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import sys
import traceback
from typing import Annotated, Any

import typer

from normfree import __version__
from normfree.cli.bench import bench
from normfree.cli.depth import depth
from normfree.cli.entropy import entropy
from normfree.cli.finetune import finetune
from normfree.cli.interpret import interpret
from normfree.cli.plugins import CommandGroup
from normfree.cli.prune_layers import prune_layers
from normfree.cli.remove_norm import remove_norm
from normfree.cli.report import report
from normfree.cli.study import study
from normfree.cli.study_worker import study_worker
from normfree.cli.to_spark import to_spark
from normfree.cli.train import train
from normfree.cli.verbose import VERBOSE_HELP, be_verbose, is_verbose
from normfree.cli.verify import verify
from normfree.errors import InputError, RunFailedError
from normfree.garbage import collect_less
from normfree.processes import speaks
from normfree.progress import shown_on
from normfree.signals import Interrupted, stopping_cleanly

# Normfree never reports usage to the hub.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Deterministic matrix products on CUDA need this before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NOT_WRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL, errno.ENODEV, errno.ENXIO),
}
"""OS errors that another folder fixes."""
PASSING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY),
    *(errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED),
}
"""OS errors after which a retry may succeed, once their cause is gone."""
PASSING_FAILURES = re.compile(r"DataLoader worker|out of memory|CUDA error|NCCL|[Cc]onnection")
"""Messages of torch's RuntimeErrors after which a retry may succeed: workers, memory, devices, connections."""
TRACEBACK = "NORMFREE_TRACEBACK"
"""Environment variable that asks for the traceback of an unexpected error."""
RESUMING = ("study", "study-worker", "train", "finetune", "remove-norm")
"""Commands that write checkpoints and resume from them."""
COMMANDS: dict[Any, str] = {
    study: "Train and compare the configurations of a paper",
    study_worker: "Help with a study, on this machine or another",
    train: "Train one configuration",
    finetune: "Fine-tune a model on prompts and completions",
    entropy: "Attention entropy of every head of a model",
    remove_norm: "Take every norm out of a trained model",
    interpret: "What norms hide: attribution, patching, neurons, sinks",
    depth: "Which layers of a model do little",
    prune_layers: "Export a model without some of its layers",
    to_spark: "Turn a dense model into a sparse one to train on",
    report: "Write the report of a study again",
    verify: "Check that finished runs are what they say",
}
"""Every command, and its line in the list of commands."""

app = typer.Typer(
    name="normfree",
    cls=CommandGroup,
    help="What normalization, activation functions and sparsity do to a transformer language model.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help_without_command(context: typer.Context) -> None:
    # typer's own no_args_is_help raises the help as an error message, which main() prints as one line.
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"normfree {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _app(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=VERBOSE_HELP, callback=be_verbose)] = False,
) -> None:
    context.with_resource(shown_on(None))  # where a command shows its progress ends with the command
    _help_without_command(context)


for _command, _line in COMMANDS.items():
    app.command(_command.__name__.replace("_", "-"), short_help=_line)(_command)
app.add_typer(
    bench,
    name="bench",
    short_help="What things cost in time and memory, here",
    callback=_help_without_command,
    invoke_without_command=True,
)


def main() -> None:
    """Runs the command line. Every failure is one line on standard error, and an exit code for its kind."""
    collect_less()
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("normfree: %(message)s"))
    logging.getLogger("normfree").addHandler(warnings)
    try:
        with stopping_cleanly():
            code = app(prog_name="normfree", standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2, everywhere=True)
    except RunFailedError as error:
        _fail(str(error), 1, everywhere=True)
    except typer.TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "normfree")
        _fail(f"{error.format_message()} (see: {command} --help)", 2)
    except Interrupted as stop:
        _fail(f"{stop}; {_retry()}: {shlex.join(['normfree', *sys.argv[1:]])}", 128 + stop.signal, everywhere=True)
    except OSError as error:
        is_bad_place = error.errno in NOT_WRITABLE
        advice = "; give another folder" if is_bad_place else ""
        if error.errno in PASSING:
            advice = f"; once that is fixed, {_retry()}"
        where = f" {error.filename}" if error.filename is not None else ""
        _fail(f"cannot use{where}: {error.strerror or error}{advice}", 2 if is_bad_place else 1)
    except Exception as error:
        if TRACEBACK in os.environ or is_verbose():
            traceback.print_exc()
        advice = f"; {_retry()}" if _may_pass(error) else ""
        _fail(f"failed ({type(error).__name__}: {error}){advice}; {TRACEBACK}=1 shows where it failed", 1)
    finally:
        logging.getLogger("normfree").removeHandler(warnings)
        be_verbose(False)
    sys.exit(code if isinstance(code, int) else 0)


def _retry() -> str:
    """What the same command does when it is given again."""
    resumes = sys.argv[1:2] and sys.argv[1] in RESUMING
    return "the same command resumes from the last checkpoint" if resumes else "the same command begins again"


def _may_pass(error: Exception) -> bool:
    """True if a retry may succeed after this unexpected error."""
    passing = isinstance(error, RuntimeError) and PASSING_FAILURES.search(str(error)) is not None
    return passing or isinstance(error, MemoryError)


def _fail(message: str, code: int, *, everywhere: bool = False) -> None:
    """Ends with ``code``. If all processes of a run fail (``everywhere``), one of each machine prints the message."""
    if speaks() or not everywhere:
        print(f"normfree: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
