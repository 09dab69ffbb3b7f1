"""Probes that a run records where its recipe names them (``recipe.probes``): a file each.

A file defines ``PROBE``, which makes a :class:`~normfree.probes.probe.Probe` of the model; the probe's name is the
file's. Other packages declare theirs by entry points of the group ``normfree.probes``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from normfree.errors import unknown_name
from normfree.probes.probe import Probe

GROUP = "normfree.probes"


def optional_probes() -> dict[str, EntryPoint]:
    """Where each probe is defined, by name. Nothing is imported."""
    built_in = (
        EntryPoint(module.name, f"{__name__}.{module.name}:PROBE", GROUP) for module in pkgutil.iter_modules(__path__)
    )
    return {entry.name: entry for entry in (*entry_points(group=GROUP), *built_in)}


def optional_probe(name: str, model: nn.Module) -> Probe:
    """The probe with that name, for ``model``.

    Raises:
        InputError: there is no such probe, or the model is none that it reads.
    """
    probes = optional_probes()
    if name not in probes:
        raise unknown_name("probe", name, sorted(probes))
    make: Callable[[Any], Probe] = probes[name].load()
    return make(model)
