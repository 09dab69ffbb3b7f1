"""``normfree study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Json, changes, open_console
from normfree.cli.report import write_report
from normfree.errors import InputError
from normfree.locks import locked


def study(
    name: Annotated[str, typer.Argument(help="The study; a wrong name lists them all.")],
    preset: Annotated[str, typer.Option(help="The size: a preset's name, or a YAML file of the same form.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Study folder; default studies/NAME-PRESET.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated seeds, e.g. 0,1,2; default: the preset's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training budget of each run, in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training budget of each run, in optimizer steps.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="installed-python, directory:PATH[:GLOB], file:PATH, codeparrot or hf:NAME."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="'train', or a Hugging Face tokenizer's name or path.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change any value of the preset, e.g. --set model.n_layer=4. Can be repeated."),
    ] = None,
    tune_lr: Annotated[
        bool, typer.Option(help="Also give each configuration its own learning rate, from a short sweep.")
    ] = False,
    all_: Annotated[
        bool, typer.Option("--all", help="With relu-revival: every table and figure of the paper, all its models.")
    ] = False,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Train the configurations of a paper, compare them, and write tables, figures and a report.

    A study that was stopped goes on where it was when the same command is given again.

    Example: normfree study relu-revival --preset cpu --seeds 0,1,2
    """
    from normfree.studies import Preset, begin, load_preset

    if all_ and name != "relu-revival":
        raise InputError(f"--all is for relu-revival, not for {name}; leave it out")
    name = f"{name}-all" if all_ else name
    wanted = changes(set_, tokens=tokens, steps=steps, corpus=corpus, tokenizer=tokenizer)

    def changed(preset: Preset) -> Preset:
        return preset.with_changes(**wanted)

    chosen_seeds = _seeds(seeds) if seeds is not None else None
    console = open_console(json_)
    folder = out or Path("studies") / f"{name}-{Path(preset).stem}"
    begin(name, folder, preset, changed)  # a folder that is refused is not even locked
    with locked(folder):
        begun = begin(name, folder, preset, changed)
        console.print(f"Study {name}, preset {Path(preset).stem}: {load_preset(preset).description}", highlight=False)
        begun.run(chosen_seeds, tune_lr=tune_lr, cache_dir=cache_dir, console=console)
        write_report(begun, console, json_=json_)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds {text!r} is not a comma-separated list of numbers, e.g. 0,1,2") from error
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds {text!r}: seeds must be different numbers from 0")
    return seeds
