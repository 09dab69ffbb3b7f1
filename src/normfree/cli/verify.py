"""``normfree verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Json, open_console


def verify(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, or of a study: all finished runs in it.")],
    evaluate: Annotated[bool, typer.Option(help="Also measure the loss of the last checkpoint again.")] = True,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Check that finished runs are what they say: files, configuration, telemetry, results, and the loss itself.

    Exits with 1 if something does not hold, with a line for each such thing.

    Example: normfree verify studies/relu-revival-cpu
    """
    from normfree.training.verification import run_folders, verify_run

    console = open_console(json_)
    found = []
    for run in run_folders(folder):
        each = verify_run(run, cache_dir, evaluate=evaluate)
        found.append(each)
        for line in (*each.problems, *(f"not checked: {what}" for what in each.unchecked)):
            console.print(f"{run}: {line}", highlight=False, markup=False, soft_wrap=True)
    n_bad = sum(not each.holds for each in found)
    if json_:
        rows = [
            {"folder": str(each.folder), "holds": each.holds, "problems": each.problems, "unchecked": each.unchecked}
            for each in found
        ]
        print(json.dumps({"holds": n_bad == 0, "runs": rows}))
    else:
        console.print(f"{len(found) - n_bad} of {len(found)} runs hold", highlight=False)
    if n_bad:
        raise typer.Exit(1)
