"""``normfree report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from normfree.cli.console import open_console, say
from normfree.cli.options import Json, StudyFile, checked_folder

if TYPE_CHECKING:
    from normfree.runner import StudyResult


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study.")],
    study: StudyFile = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Also copy what the report is made of to this folder: finished runs without checkpoints, for a "
            "repository. It is a study folder too; runs that it holds stay.",
            callback=checked_folder,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Write the table, the figures and the report of a study again, from the runs that are finished.

    Example: normfree report studies/relu-revival-cpu
    """
    from normfree.runner import keep_tables, load_study

    result = load_study(folder, study)
    result.write_report()
    console = open_console(json_)
    show_study(result, console, json_=json_)
    if keep is not None:
        n_run = keep_tables(folder, keep, study)
        if not json_:
            say(console, f"Kept:    {keep} (runs added: {n_run})")


def show_study(result: StudyResult, console: Console, *, json_: bool) -> None:
    """Prints the tables of a study, and where its report is."""
    from normfree.report import to_console

    if json_:
        rows = {name: json.loads(table.to_json(orient="records")) for name, table in result.tables.items()}
        print(json.dumps({"folder": str(result.folder), **rows}))
        return
    for table in result.tables.values():
        console.print(to_console(table))
    console.print(f"Report:  {result.report}\nFolder:  {result.folder}", highlight=False, soft_wrap=True)
