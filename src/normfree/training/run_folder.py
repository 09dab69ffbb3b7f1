"""Files of a run folder: what marks it as finished, and which of its checkpoints are whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml

from normfree.files import first_difference, read_regular, sha256, write_text

log = logging.getLogger(__name__)

RESULTS_FILE = "results.csv"
"""Written last: a run that has it is finished."""
CONFIG_FILE = "config.yaml"
PROVENANCE = "provenance"
RUN = "run"
"""In the provenance: the identity of the run, which its checkpoints repeat."""
MANIFEST_FILE = "checkpoint.json"
"""In each checkpoint: the run it belongs to, its step, and the size and SHA-256 of all its other files."""
STATE_FILE = "trainer_state.json"
"""The step; named as by transformers' Trainer, which wrote it in older versions."""


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML has no C library on some platforms."""


def parsed_yaml(text: str) -> Any:
    """The content of a YAML document without object tags.

    Raises:
        yaml.YAMLError, RecursionError: of the Python parser, which says where; the C parser is ten times as fast.
    """
    loader = _LOADER(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        return yaml.safe_load(text)
    finally:
        loader.dispose()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, damaged ones too, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before the checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in ``folder``; the log says what is wrong with newer ones."""
    for checkpoint in reversed(checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s cannot be used and is passed over: %s", checkpoint, problem)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is.

    One without a manifest, from an older version, counts as whole if its state, which is written last, has the right
    step, and its model is Normfree's.
    """
    if not (checkpoint / MANIFEST_FILE).exists():
        return _damage_without_manifest(checkpoint)
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        run, step = manifest["run"], manifest["step"]
        files = {str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST_FILE} is not as it was written"
    if step != step_of(checkpoint):
        return f"it is of step {step}"
    if run != run_identity(checkpoint.parent):
        return "it belongs to another run"
    return first_difference(checkpoint, files)


def write_manifest(checkpoint: Path, run: str | None) -> None:
    """Writes ``checkpoint.json`` for all files in ``checkpoint``, a checkpoint of ``run``."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    content = {"run": run, "step": step_of(checkpoint), "files": files}
    write_text(checkpoint / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")


def run_identity(folder: Path) -> str | None:
    """Identifies configuration and data of the run in ``folder``, as recorded when it began."""
    return recorded(folder / CONFIG_FILE, RUN)


def recorded(config_path: Path, name: str) -> str | None:
    """An entry of the provenance in a run's ``config.yaml``, None where the file has none."""
    try:
        content = parsed_yaml(read_regular(config_path).decode("utf-8"))
        value = content[PROVENANCE][name]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None
    return str(value)


def _damage_without_manifest(checkpoint: Path) -> str | None:
    step, model_type = (
        _entry(checkpoint / name, entry) for name, entry in ((STATE_FILE, "global_step"), ("config.json", "model_type"))
    )
    if step is None:
        return f"it was not written to its end ({STATE_FILE} is missing or damaged)"
    if step != step_of(checkpoint):
        return f"it is of step {step}"
    return None if model_type == "normfree" else f"it is of another program (model type {model_type})"


def _entry(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None
