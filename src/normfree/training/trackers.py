"""A run's metrics in TensorBoard, W&B or Trackio, as they are logged: ``recipe.report_to``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from normfree.devices import runs_on_cpu
from normfree.training.run_config import RunConfig
from normfree.training.run_folder import run_identity

PROJECT = "normfree"


def accelerator_for(config: RunConfig, folder: Path) -> Accelerator:
    """Device, processes and tracker of a run; precision, DDP and sharding are torch's own (see the loop)."""
    name = config.recipe.report_to
    return Accelerator(cpu=runs_on_cpu(), project_dir=folder, log_with=None if name == "none" else name)


def begin_tracking(accelerator: Accelerator, config: RunConfig, folder: Path, step: int) -> None:
    """Begins the tracker's run, or continues it after ``step``; what was logged later is logged again."""
    tracker = config.recipe.report_to
    if tracker == "none":
        return
    project, options = PROJECT, dict[str, Any]()
    if tracker == "tensorboard":
        # The folder's name; events of later steps than the checkpoint's are hidden.
        project, options = tracker, {"purge_step": step + 1}
    else:
        run = run_identity(folder)
        name = f"{config.model_name} {config.configuration} seed {config.seed} {run}"
        options = {"name": name, "resume": "allow", "config": config.model_dump(mode="json")}
        options |= {"id": run, "dir": str(folder)} if tracker == "wandb" else {}
    with redirect_stdout(sys.stderr):
        accelerator.init_trackers(project, init_kwargs={tracker: options})


def end_tracking(accelerator: Accelerator) -> None:
    """Ends the tracker's run. Accelerator's own method would also close the connection of the processes."""
    with redirect_stdout(sys.stderr):
        while accelerator.trackers:
            accelerator.trackers.pop().finish()
