"""``normfree study-worker``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.console import open_console
from normfree.cli.options import Json, StudyFile
from normfree.errors import RunFailedError
from normfree.processes import check_alone


def study_worker(
    folder: Annotated[Path, typer.Argument(help="The folder of a study that `normfree study` is training.")],
    study: StudyFile = None,
    json_: Json = False,
) -> None:
    """Help with a study, on this machine or on another one with the same file system.

    Trains runs that nobody else has, until none is left. The command that began the study measures them and writes
    its report.

    Example: normfree study-worker studies/relu-revival-gpu
    """
    from normfree.runner import failure_summary, help_with

    check_alone("normfree study-worker", "leave the launcher out, and start it once for each run to be trained at once")
    failures = help_with(folder, open_console(json_), study)
    if json_:
        print(json.dumps({"folder": str(folder), "failures": failures}))
    if failures:
        raise RunFailedError(failure_summary(failures))
