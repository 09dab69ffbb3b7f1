"""Checks that a run folder belongs to this run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.files import write_text
from normfree.locks import holds_nothing
from normfree.training.run_config import RunConfig, load_run_config, provenance
from normfree.training.run_folder import CONFIG_FILE, RUN, recorded


def check_claim(folder: Path, config: RunConfig, data: PackedData) -> None:
    """Checks that ``folder`` belongs to this run, or can become its folder; writes nothing.

    Raises:
        InputError: it holds a run of another configuration or other data, or something that is no run.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        differences = _differences(_content(load_run_config(path)), _content(config))
        fingerprint = recorded(path, "corpus_fingerprint")
        if fingerprint != data.fingerprint:
            differences.append(f"corpus fingerprint: {fingerprint} there, {data.fingerprint} asked for")
        if differences:
            raise InputError(
                f"{folder} holds a run of another configuration ({'; '.join(differences)}); "
                "give another output folder, or the same options"
            )
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give another output folder")
    elif not holds_nothing(folder):
        raise InputError(f"{folder} is not empty and holds no run ({CONFIG_FILE} is missing); give another folder")


def claim(folder: Path, config: RunConfig, data: PackedData) -> None:
    """Makes ``folder`` this run's, or checks that it is.

    Raises:
        InputError: see :func:`check_claim`.
    """
    check_claim(folder, config, data)
    if not (folder / CONFIG_FILE).exists():
        identity = json.dumps([config.model_dump(mode="json", exclude_defaults=True), data.fingerprint], sort_keys=True)
        run = hashlib.sha256(identity.encode()).hexdigest()[:16]
        write_text(folder / CONFIG_FILE, config.to_yaml({RUN: run, **provenance(data)}))


def _content(config: RunConfig) -> dict[str, Any]:
    """What makes a run what it is: not its sharding or tracker, which may change while it is stopped."""
    return config.model_dump(mode="json", exclude={"recipe": {"sharding", "report_to"}})


def _differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(there.keys() | asked.keys()):
        old, new = there.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.extend(_differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name}: {old!r} there, {new!r} asked for")
    return found
