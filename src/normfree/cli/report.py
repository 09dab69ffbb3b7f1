"""``normfree report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from normfree.cli.options import Json, open_console

if TYPE_CHECKING:
    from normfree.studies import CollectionFolder, StudyPage


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study.")],
    json_: Json = False,
) -> None:
    """Write the table, the figures and the report of a study again, from the runs that are finished.

    Example: normfree report studies/relu-revival-cpu
    """
    from normfree.studies import open_folder

    write_report(open_folder(folder), open_console(json_), json_=json_)


def write_report(opened: StudyPage | CollectionFolder, console: Console, *, json_: bool) -> None:
    from normfree.report import to_console

    report_path = opened.write()
    if json_:
        rows = {name: json.loads(table.to_json(orient="records")) for name, table in opened.tables.items()}
        print(json.dumps({"folder": str(opened.path), **rows}))
        return
    for table in opened.tables.values():
        console.print(to_console(table))
    console.print(f"Report:  {report_path}\nFolder:  {opened.path}", highlight=False, soft_wrap=True)
