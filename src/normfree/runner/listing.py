"""The studies there are: what each asks, its presets and its runs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from normfree.errors import InputError
from normfree.runner.catalog import installed_studies
from normfree.runner.presets import Preset, load_preset, preset_names
from normfree.runner.run_order import planned_runs
from normfree.runner.study import Collection, Study


def list_studies() -> list[dict[str, Any]]:
    """Every study and collection: name, what it asks, and for each preset made for it the runs of one seed.

    Fine-tuned copies of a run, such as those of the studies of norm removal, are not counted.
    """
    return [{"study": name, "asks": each.question, "runs": _runs(each)} for name, each in installed_studies().items()]


def list_presets() -> dict[str, str]:
    """The presets that come with the package, and what each is for, with its time where that is known."""
    return {name: load_preset(name).description for name in preset_names()}


def _runs(study: Study | Collection) -> dict[str, int]:
    """Runs of one seed by preset, without presets that the study's configurations cannot be trained with."""
    runs = {}
    for preset in study.presets:
        with suppress(InputError):
            runs[preset] = sum(_n_run(*each) for each in _members(study, preset))
    return runs


def _members(study: Study | Collection, preset: str) -> list[tuple[Study, Preset]]:
    if isinstance(study, Study):
        return [(study, load_preset(preset))]
    return [(each.study, each.preset) for each in study.members(preset, lambda content: content)]


def _n_run(study: Study, preset: Preset) -> int:
    return len(planned_runs(study, preset, preset.seeds[:1], tune_lr=False))
