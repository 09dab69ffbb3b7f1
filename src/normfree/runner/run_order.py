"""The runs of a study in order, with their dependencies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from normfree.errors import InputError, unknown_name
from normfree.runner.presets import Preset
from normfree.runner.study import Configuration, Study, run_config, slug
from normfree.runner.study_folder import LEARNING_RATE_FACTORS, StudyFolder
from normfree.training import RunConfig, load_run_config
from normfree.training.run_folder import CONFIG_FILE, RESULTS_FILE

SWEEP_DECAY = 0.2
"""Share of the budget over which a run of the sweep lets its rate decay, after a warm-up as long as the whole run's."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: its folder below the study's, which is its name too, and the runs that it requires.

    ``run`` is what to train; a run of the group ``tuned`` has the recipe's learning rate there, because its own is
    known only after its sweep (see :func:`to_train`).
    """

    place: str
    run: RunConfig
    requires: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """``runs``, ``sweep`` or ``tuned``."""
        return self.place.partition("/")[0]

    @property
    def label(self) -> str:
        """For log lines: configuration and seed, and the group if it is not ``runs``."""
        name = f"{self.run.configuration} seed {self.run.seed}"
        if self.group == "sweep":
            return f"{name}, sweep at {self.run.recipe.learning_rate:g}"
        return f"{name}, tuned" if self.group == "tuned" else name

    @property
    def n_tokens(self) -> int:
        """Tokens it trains on."""
        return self.run.recipe.n_tokens(self.run.data.sequence_length)


def planned_runs(
    study: Study, preset: Preset, seeds: Sequence[int], *, tune_lr: bool, only: Collection[str] | None = None
) -> tuple[PlannedRun, ...]:
    """All runs of a study, in the order in which one process trains them.

    Every configuration is trained with every seed. With ``tune_lr`` each is then trained at each multiple of the
    learning rate in ``LEARNING_RATE_FACTORS`` (the preset's first seed), with the whole run's warm-up and a decay
    over :data:`SWEEP_DECAY` of the budget, and for the whole budget at its best rate (all seeds). A teacher comes
    before its students, and a configuration's sweep before its tuned runs. With ``only`` the configurations of these
    labels are planned, and those that they cannot do without: the study's baseline, and their teachers.

    Raises:
        InputError: a configuration or the recipe cannot be used, a teacher would be missing, or ``only`` has a label
            that the study has not.
    """
    configurations = study.configurations(preset)
    if tune_lr and any("learning_rate" in each.recipe for each in configurations):
        raise InputError(
            f"--tune-lr means nothing for {study.name}, which sets the learning rate of each configuration"
        )
    for configuration in configurations:
        run = run_config(preset, configuration, seeds[0])
        run.build_model_config(preset.data.vocab_size)
        if run.objective is not None:
            run.objective.check(run.recipe)
    _check_teachers(configurations, preset, seeds, tune_lr=tune_lr)
    preset.recipe.check(preset.data.sequence_length)
    if only is not None:
        configurations = _chosen(configurations, {study.baseline, *only})

    pairs = [(seed, configuration) for seed in seeds for configuration in configurations]
    runs = [_planned("runs", preset, configuration, seed) for seed, configuration in pairs]
    if not tune_lr:
        return tuple(runs)
    sweep = {configuration.label: tuple(_sweep(preset, configuration)) for configuration in configurations}
    tuned = [
        _planned("tuned", preset, configuration, seed, *(each.place for each in sweep[configuration.label]))
        for seed, configuration in pairs
    ]
    return (*runs, *(each for of_configuration in sweep.values() for each in of_configuration), *tuned)


def to_train(planned: PlannedRun, folder: StudyFolder) -> RunConfig | None:
    """What to train for a run whose turn has come; None for a tuned run whose best rate is the recipe's."""
    if planned.group != "tuned":
        return planned.run
    rate = folder.best_learning_rates()[planned.run.configuration]
    if rate == folder.preset.recipe.learning_rate:
        return None
    return planned.run.model_copy(update={"recipe": planned.run.recipe.model_copy(update={"learning_rate": rate})})


def is_finished(planned: PlannedRun, folder: StudyFolder) -> bool:
    """True if a run whose turn has come needs no more training."""
    run, place = to_train(planned, folder), folder.path / planned.place
    return run is None or ((place / RESULTS_FILE).exists() and load_run_config(place / CONFIG_FILE) == run)


def _chosen(configurations: Sequence[Configuration], labels: Collection[str]) -> tuple[Configuration, ...]:
    """Those of ``labels``, and all that they learn from; in the study's order."""
    names = [each.label for each in configurations]
    for label in labels:
        if label not in names:
            raise unknown_name("configuration", label, names)
    chosen = set(labels)
    for configuration in reversed(configurations):  # a teacher comes before its students
        if configuration.label in chosen and configuration.teacher is not None:
            chosen.add(configuration.teacher)
    return tuple(each for each in configurations if each.label in chosen)


def _planned(group: str, preset: Preset, configuration: Configuration, seed: int, *requires: str) -> PlannedRun:
    place = f"{group}/{configuration.slug}/seed-{seed}"
    teacher = _teacher(configuration, seed)
    return PlannedRun(place, run_config(preset, configuration, seed), (*teacher, *requires))


def _teacher(configuration: Configuration, seed: int) -> tuple[str, ...]:
    return () if configuration.teacher is None else (f"runs/{slug(configuration.teacher)}/seed-{seed}",)


def _sweep(preset: Preset, configuration: Configuration) -> Iterator[PlannedRun]:
    whole = preset.recipe.n_steps(preset.data.sequence_length)
    warmup = preset.recipe.n_warmup_steps(preset.data.sequence_length)
    steps, seed = warmup + max(1, round(SWEEP_DECAY * whole)), preset.seeds[0]
    for factor in LEARNING_RATE_FACTORS:
        run = run_config(preset, configuration, seed, learning_rate=factor * preset.recipe.learning_rate)
        recipe = run.recipe.model_copy(
            update={
                "steps": steps,
                "tokens": None,
                "warmup_ratio": warmup / steps,
                "warmup_steps": None,
                "decay_steps": None,
                "save_steps": steps,
            }
        )
        yield PlannedRun(
            f"sweep/{configuration.slug}/learning-rate-{recipe.learning_rate:g}",
            run.model_copy(update={"recipe": recipe}),
            _teacher(configuration, seed),
        )


def _check_teachers(
    configurations: Sequence[Configuration], preset: Preset, seeds: Sequence[int], *, tune_lr: bool
) -> None:
    """Checks that every teacher is trained before its students.

    Raises:
        InputError: it comes after its student, or the sweep's seed is not trained.
    """
    for place, configuration in enumerate(configurations):
        if configuration.teacher is None:
            continue
        before = [each.label for each in configurations[:place]]
        if configuration.teacher not in before:
            raise unknown_name(f"teacher of {configuration.label}", configuration.teacher, before)
        if tune_lr and preset.seeds[0] not in seeds:
            raise InputError(
                f"--tune-lr sweeps with seed {preset.seeds[0]}, and {configuration.label} learns from "
                f"{configuration.teacher} of that seed; add it to --seeds"
            )
