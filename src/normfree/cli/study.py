"""``normfree study``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from normfree.cli.console import open_console, print_json, records, say, table
from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    CacheDir,
    Device,
    Json,
    changes,
    checked_corpus,
    checked_folder,
    checked_source,
    nested_assignments,
    numbers,
)
from normfree.cli.report import show_study
from normfree.errors import InputError, RunFailedError
from normfree.processes import check_alone

Name = Annotated[
    str | None,
    typer.Argument(
        help="The study; --list shows them all. Or the path of a file of your own that defines one; it is run.",
        show_default=False,
    ),
]
List = Annotated[bool, typer.Option("--list", help="Show every study: what it asks, its presets and runs; then exit.")]
Plan = Annotated[
    bool, typer.Option("--plan", help="Show tokens, memory and time of each configuration, by a trial step; then exit.")
]
Preset = Annotated[str, typer.Option(help="The size: a preset's name, or a YAML file of the same form.")]
Out = Annotated[Path | None, typer.Option(help="Study folder; default studies/NAME-PRESET.", callback=checked_folder)]
Seeds = Annotated[str | None, typer.Option(help="Comma-separated seeds, e.g. 0,1,2; default: the preset's.")]
Tokens = Annotated[int | None, typer.Option(help="Training budget of each run, in tokens.")]
Steps = Annotated[int | None, typer.Option(help="Training budget of each run, in optimizer steps.")]
Corpus = Annotated[
    str | None,
    typer.Option(
        help="A file, a folder, - (standard input), installed-python, directory:PATH:GLOB, codeparrot or hf:NAME.",
        callback=checked_corpus,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="'train', or a Hugging Face tokenizer's name or path.", callback=checked_source("tokenizer")),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change any value of the preset, e.g. --set model.n_layer=4. Can be repeated."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Train the baseline and the configuration of this label only. Can be repeated."),
]
TuneLr = Annotated[bool, typer.Option(help="Also give each configuration its own learning rate, from a short sweep.")]
All = Annotated[
    bool, typer.Option("--all", help="With relu-revival: every table and figure of the paper, all its models.")
]
Engine = Annotated[str, typer.Option(help="Where runs are trained: local, slurm or ray. See docs/many-machines.md.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Runs at work at once; with local, default: one after the other in this process."),
]
EngineSet = Annotated[
    list[str] | None,
    typer.Option("--executor-set", help="An option of the executor, e.g. partition=gpu. Can be repeated."),
]
Retries = Annotated[
    int | None,
    typer.Option(min=0, help="With workers: how often a run is tried again with no checkpoint in between; or 2."),
]


def study(
    name: Name = None,
    list_: List = False,
    plan: Plan = False,
    preset: Preset = "cpu",
    out: Out = None,
    seeds: Seeds = None,
    tokens: Tokens = None,
    steps: Steps = None,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    set_: Set = None,
    only: Only = None,
    tune_lr: TuneLr = False,
    all_: All = False,
    executor: Engine = "local",
    workers: Workers = None,
    executor_set: EngineSet = None,
    retries: Retries = None,
    device: Device = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Train the configurations of a paper, compare them, and write tables, figures and a report.

    A stopped study resumes when the same command is given again.

    Example: normfree study relu-revival --preset cpu --seeds 0,1,2
    """
    from normfree.runner import DEFAULT_RETRIES, failure_summary, make_executor, run_study

    if list_:
        _show_studies(open_console(json_), json_=json_)
        return
    if name is None:
        raise InputError("name a study; normfree study --list shows them all")
    check_alone("normfree study", "leave the launcher out, and give --workers to train several runs at once")
    if all_ and name != "relu-revival":
        raise InputError(f"--all is for relu-revival, not for {name}; leave it out")
    name = f"{name}-all" if all_ else name
    options: dict[str, Any] = {
        "seeds": None if seeds is None else numbers("--seeds", seeds, "0,1,2"),
        "out": out,
        "changes": changes(set_, tokens=tokens, steps=steps, corpus=corpus, tokenizer=tokenizer),
        "only": only,
        "tune_lr": tune_lr,
        "device": device,
    }
    if plan:
        _show_plan(name, preset, options, json_=json_)
        return
    chosen = make_executor(executor, nested_assignments("--executor-set", executor_set), workers)
    if chosen is None and retries is not None:
        raise InputError("--retries means nothing without --workers, --executor slurm or --executor ray")
    options |= {"executor": chosen, "cache_dir": cache_dir, "progress": (console := open_console(json_))}
    result = run_study(name, preset, retries=DEFAULT_RETRIES if retries is None else retries, **options)
    show_study(result, console, json_=json_)
    if result.failures:
        raise RunFailedError(f"{failure_summary(result.failures)}; the same command tries again")


def _show_plan(name: str, preset: str, options: dict[str, Any], *, json_: bool) -> None:
    """Prints what a study will take."""
    from normfree.progress import duration
    from normfree.runner.study_plan import plan_study
    from normfree.training.training_plan import memory

    console = open_console(json_)
    planned = plan_study(name, preset, **options)
    seconds = float(planned["seconds"].sum())
    if json_:
        print_json(seconds=seconds, runs=records(planned))
        return
    columns = ("study", "group", "configuration", "runs", "steps", "tokens a run", "parameters", "memory", "time")
    rows = (
        (
            *(row[each] for each in columns[:3]),
            *(f"{row[each]:,}" for each in ("n_run", "steps", "tokens", "parameters")),
            *(memory(row["memory_bytes"]), duration(row["seconds"])),
        )
        for row in planned.to_dict("records")
    )
    console.print(table(columns, rows, n_left=3))
    say(console, f"{planned['n_run'].sum()} runs, about {duration(seconds)} of training one after the other")


def _show_studies(console: Console, *, json_: bool) -> None:
    """Prints every study and every preset."""
    from normfree.runner import list_presets, list_studies

    studies, presets = list_studies(), list_presets()
    if json_:
        print(json.dumps({"studies": studies, "presets": presets}))
        return
    for each in studies:
        console.print(f"{each['study']}: {each['asks']}", highlight=False, markup=False, soft_wrap=True)
        runs = ", ".join(f"{preset} {n}" for preset, n in each["runs"].items())
        console.print(f"    runs a seed: {runs}", highlight=False, markup=False, soft_wrap=True)
    console.print("\nPresets", highlight=False)
    for name, description in presets.items():
        console.print(f"{name}: {description}", highlight=False, markup=False, soft_wrap=True)
