"""``normfree verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.console import open_console, print_json, say
from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Device, Json


def verify(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, or of a study: all finished runs in it.")],
    evaluate: Annotated[bool, typer.Option(help="Also measure the loss of the last checkpoint again.")] = True,
    device: Device = None,
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
        each = verify_run(run, cache_dir, evaluate=evaluate, device=device)
        found.append(each)
        for line in (*each.problems, *(f"not checked: {what}" for what in each.unchecked)):
            say(console, f"{run}: {line}")
    n_bad = sum(not each.holds for each in found)
    if json_:
        rows = [
            {"folder": str(each.folder), "holds": each.holds, "problems": each.problems, "unchecked": each.unchecked}
            for each in found
        ]
        print_json(holds=n_bad == 0, runs=rows)
    else:
        say(console, f"{len(found) - n_bad} of {len(found)} runs hold")
    if n_bad:
        raise typer.Exit(1)
