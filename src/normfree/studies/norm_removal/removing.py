"""What the studies of norm removal measure: removals from every finished run, in several ways and at several rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from normfree.columns import EVAL_LOSS
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.removal.finetuning import RemovalDivergedError
from normfree.removal.layout import NORM_FREE, ORIGINAL, TABLE_FILE, VANILLA
from normfree.removal.parts import check_removable, parts_to_remove
from normfree.removal.plan import Plan, plan
from normfree.removal.removal import remove
from normfree.removal.schedule import RemovalSchedule, automatic_schedule
from normfree.runner import Configuration, Measurement, Preset, RemovalOptions, run_config, slug
from normfree.studies.norm_removal.tables import REMOVALS
from normfree.training import Callback, RunResult, StudyProgress

Configurations = Callable[[Preset], tuple[Configuration, ...]]


@dataclass(frozen=True)
class Way:
    """A way to remove norms: the automatic schedule and the default recipe with some values changed.

    label: the variant's name in tables.
    schedule, recipe: changed values by name.
    ramp_share: ``ramp_steps`` of the schedule as a share of the budget.
    control: whether the same fine-tuning with the norms kept is trained too.
    """

    label: str
    schedule: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    ramp_share: float = 0.0
    control: bool = False

    @property
    def control_label(self) -> str:
        """The variant's name of the control."""
        return VANILLA if self.label == NORM_FREE else f"{VANILLA}, {self.label}"

    def changed(self, schedule: RemovalSchedule, n_step: int) -> RemovalSchedule:
        """``schedule``, of a budget of ``n_step``, with this way's values."""
        ramp = {"ramp_steps": max(2, round(self.ramp_share * n_step))} if self.ramp_share else {}
        return RemovalSchedule.model_validate({**schedule.model_dump(), **self.schedule, **ramp})

    def place(self, run: Path, share: float, rate: float) -> Path:
        """The folder of one removal in the folder of the run whose model it starts from."""
        removals = run / "removals" / ("" if self.label == NORM_FREE else slug(self.label))
        return removals / f"budget-{share:g}" / f"learning-rate-{rate:g}"


DEFAULT = Way(NORM_FREE, control=True)


def options(preset: Preset) -> RemovalOptions:
    """The preset's, or the default ones."""
    return preset.removal if preset.removal is not None else RemovalOptions()


def measurement(study_configurations: Configurations, *ways: Way) -> Callable[[Preset], Measurement]:
    """Removes the norms of each finished run in each of ``ways``, at every budget and learning rate of the preset.

    Each removal has its own folder in the run's (see :meth:`Way.place` and :func:`normfree.removal.remove`); a finished
    one is not repeated. A run that diverged keeps its norms.
    """

    def of_preset(preset: Preset) -> Measurement:
        def check() -> None:
            for configuration, way in product(study_configurations(preset), ways):
                _check(preset, configuration, way)

        def measure(result: RunResult, data: PackedData, console: Console) -> None:
            if result.row["status"] == "finished":
                _remove_from(result, data, console, list(_cells(ways, options(preset))))

        return Measurement(check, measure)

    return of_preset


def removals_frame(results: Iterable[RunResult], grid: RemovalOptions, *ways: Way) -> pd.DataFrame:
    """A row a variant of every finished removal, as ``at_best_rates`` takes it (see ``tables``).

    Variants are the original (with the first of ``ways``), each way, and each control.
    """
    frames = []
    for result, (way, share, rate) in product(results, _cells(ways, grid)):
        path = way.place(result.folder, share, rate) / TABLE_FILE
        if path.exists():
            table = pd.read_csv(path, keep_default_na=False, na_values=["nan"])
            tokens = table["finetuning_tokens"].max()
            names = {NORM_FREE: way.label, VANILLA: way.control_label}
            table["variant"] = table["variant"].replace(names)
            if way is not ways[0]:
                table = table[table["variant"] != ORIGINAL]
            key = {"configuration": result.row["configuration"], "seed": result.row["seed"]}
            budget = {"share": share, "learning_rate": rate, "finetuning_tokens": tokens}
            frames.append(table[["variant", EVAL_LOSS]].assign(**key, **budget))
    return pd.concat(frames, ignore_index=True)[list(REMOVALS)] if frames else pd.DataFrame(columns=list(REMOVALS))


def _cells(ways: Sequence[Way], grid: RemovalOptions) -> Iterator[tuple[Way, float, float]]:
    return product(ways, grid.budget_shares, grid.learning_rates)


def _check(preset: Preset, configuration: Configuration, way: Way) -> None:
    run = run_config(preset, configuration, preset.seeds[0])
    model = run.build_model_config(preset.data.vocab_size)
    check_removable(model)
    n_step = run.recipe.n_steps(preset.data.sequence_length)
    for share in options(preset).budget_shares:
        steps = round(share * n_step)
        automatic = automatic_schedule(model.n_layer, steps, parts_to_remove(model, "keep"))
        last = way.changed(automatic, steps).last_step(model)
        if last >= steps:
            raise InputError(
                f"removal.budget_shares has {share:g}, {steps} of {n_step} steps, and the automatic schedule of "
                f"{configuration.label} takes its last norm out at step {last}; raise it, or the budget"
            )


def _remove_from(
    result: RunResult, data: PackedData, console: Console, cells: Sequence[tuple[Way, float, float]]
) -> None:
    jobs = [
        (way, way.place(result.folder, share, rate), _planned(result, way, share, rate))
        for way, share, rate in cells
        if not (way.place(result.folder, share, rate) / TABLE_FILE).exists()
    ]
    T = data.train.sequence_length
    total = sum(planned.run.recipe.n_tokens(T) * (2 if way.control else 1) for way, _, planned in jobs)
    name = f"{result.row['configuration']} seed {result.row['seed']}"
    with StudyProgress(total, f"{name}: removal") as progress:
        for way, folder, planned in jobs:
            run, n_step = planned.run, planned.run.recipe.n_steps(T)
            label = f"{name}, {n_step} steps at {run.recipe.learning_rate:g}"

            def follow(variant: str, tokens: int, label: str = label, way: Way = way) -> tuple[Callback, ...]:
                shown = way.label if variant == NORM_FREE else variant
                return (progress.run(f"{label}: {shown}", tokens),)

            try:
                schedule = way.changed(planned.schedule, n_step)
                remove(run, data, folder, schedule, vanilla=way.control, callbacks=follow)
            except RemovalDivergedError as error:
                console.print(f"{label}: {error}", highlight=False, soft_wrap=True)


def _planned(result: RunResult, way: Way, share: float, rate: float) -> Plan:
    steps = round(share * int(result.row["steps"]))
    # Evaluated at the end alone, which takes longer than many steps of so small a budget.
    recipe = {"eval_steps": steps, **way.recipe, "steps": steps, "learning_rate": rate}
    changes = {f"recipe.{name}": value for name, value in recipe.items()}
    return plan(str(result.folder), changes=changes, seed=int(result.row["seed"]))
