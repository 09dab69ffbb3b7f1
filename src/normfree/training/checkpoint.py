"""Checkpoints, written atomically, with everything a run needs to resume as if never stopped."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, set_seed

from normfree.errors import RunFailedError
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.loading import LoadingReport
from normfree.processes import is_lost_connection, is_main_process, n_processes, on_main, process_index
from normfree.training.distributed import (
    load_whole_model,
    load_whole_optimizer_state,
    whole_model_state,
    whole_optimizer_state,
)
from normfree.training.lora import Adapters
from normfree.training.objectives import Objective
from normfree.training.run_folder import STATE_FILE, checkpoints, last_checkpoint, run_identity, step_of, write_manifest

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"
SCALER_FILE = "scaler.pt"
PROGRESS_FILE = "progress.json"
"""The sums of the losses since the last log entry: without them the first entry after resuming would be a mean over
fewer steps."""
CHECKPOINTS_KEPT = 2


@dataclass
class Checkpointed:
    """The state of a run in training, without random numbers and the sums of its losses."""

    model: NormfreeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    objective: Objective | None
    adapters: Adapters | None
    is_sharded: bool

    def load(self, checkpoint: Path) -> None:
        """Restores everything from ``checkpoint``; pickles are read with ``weights_only``.

        Raises:
            InputError: its weights are not those of the model.
        """
        if self.adapters is not None:
            self.adapters.load(checkpoint)
        else:
            self._load_model(checkpoint)
        if self.objective is not None:
            self.objective.load(checkpoint)
        # Mapped into memory where it is shared out: the processes of a machine read the same pages.
        optimizer = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=self.is_sharded)
        if self.is_sharded:
            load_whole_optimizer_state(self.optimizer, optimizer)
        else:
            self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(torch.load(checkpoint / SCHEDULE_FILE, weights_only=True))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(torch.load(checkpoint / SCALER_FILE, weights_only=True))

    def _load_model(self, checkpoint: Path) -> None:
        state: dict[str, torch.Tensor] = {}
        for path in sorted(checkpoint.glob("model*.safetensors")):
            state |= load_file(path)
        if self.is_sharded:
            missing, unexpected = load_whole_model(self.model, state)
        else:
            missing, unexpected = self.model.load_state_dict(state, strict=False)
        missing = sorted({*missing} - {*getattr(self.model, "all_tied_weights_keys", ())})
        LoadingReport(missing, sorted(unexpected), []).check(f"the checkpoint in {checkpoint.parent}", self.model)

    def save(self, folder: Path) -> None:
        """Writes everything into ``folder``, in the main process. Collective: its errors are raised everywhere."""
        model, optimizer = None, self.optimizer.state_dict()
        if self.is_sharded:
            model, optimizer = whole_model_state(self.model), whole_optimizer_state(self.optimizer)
        elif self.adapters is not None:
            # A model without adapters, which loads like any other; the adapters are saved next to it.
            model = self.adapters.plain_state()
        on_main(partial(self._write, folder, model, optimizer))

    def _write(self, folder: Path, model: dict[str, Any] | None, optimizer: dict[str, Any]) -> None:
        self.model.save_pretrained(folder, state_dict=model)
        self.tokenizer.save_pretrained(folder)
        if self.adapters is not None:
            self.adapters.save(folder)
        if self.objective is not None:
            self.objective.save(folder)
        torch.save(optimizer, folder / OPTIMIZER_FILE)
        torch.save(self.schedule.state_dict(), folder / SCHEDULE_FILE)
        if self.scaler.is_enabled():
            torch.save(self.scaler.state_dict(), folder / SCALER_FILE)


def save_checkpoint(run_folder: Path, step: int, state: Checkpointed, progress: dict[str, Any]) -> None:
    """Writes ``checkpoint-STEP`` next to its place, with a manifest, moves it there, removes older ones. Collective.

    Raises:
        RunFailedError: it cannot be written.
    """
    name = f"checkpoint-{step}"
    staging = run_folder / f".{name}"
    new, place = staging / name, run_folder / name

    def begin() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        new.mkdir(parents=True)

    def end() -> None:
        (new / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        (new / STATE_FILE).write_text(json.dumps({"global_step": step}), encoding="utf-8")
        write_manifest(new, run_identity(run_folder))
        if place.exists():
            # A damaged one, as a whole one would not be written again.
            shutil.rmtree(place)
        new.rename(place)
        remove_older(run_folder, step)

    try:
        on_main(begin)
        state.save(new)
        torch.save(_random_numbers(), new / random_numbers_file())
        PartialState().wait_for_everyone()
        on_main(end)
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_lost_connection(error):
            raise
        # safetensors and torch.save raise these for a full disk.
        raise RunFailedError(_not_saved(run_folder, name, error)) from error
    finally:
        if is_main_process():
            shutil.rmtree(staging, ignore_errors=True)


def remove_older(run_folder: Path, step: int) -> None:
    """Keeps the newest checkpoints up to ``step``, and later ones, which the run is about to write again.

    Newest by step, not by time: a clock that was set back would make the newest look oldest.
    """
    older = [each for each in checkpoints(run_folder) if step_of(each) <= step]
    for each in older[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(each)


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """The ``progress`` saved with the checkpoint; empty if there is none."""
    path = checkpoint / PROGRESS_FILE
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def random_numbers_file() -> str:
    """The file in a checkpoint that holds this process's random number states."""
    return "rng_state.pth" if n_processes() == 1 else f"rng_state_{process_index()}.pth"


def restore_random_numbers(checkpoint: Path | None, seed: int, step: int) -> None:
    """Sets this process's random numbers to those in ``checkpoint``, or to its own beginning.

    All processes begin with one seed, and so with the same weights; then each has its own random numbers, so that
    dropout differs. A checkpoint of another number of processes has no state for this one, whose numbers then come from
    seed, rank and step. A single process without a checkpoint keeps its state.
    """
    path = None if checkpoint is None else checkpoint / random_numbers_file()
    if path is not None and path.exists():
        # Functions and types of NumPy's pickled generator state.
        allowed: list[Any] = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and isinstance(state.get("cuda"), torch.Tensor):
            torch.cuda.set_rng_state(state["cuda"])
    elif path is not None or n_processes() > 1:
        set_seed(int(np.random.SeedSequence([seed, process_index(), step]).generate_state(1)[0]))


def _random_numbers() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _not_saved(folder: Path, name: str, error: Exception) -> str:
    last = last_checkpoint(folder)
    kept = f"{last.name} is the last good one" if last is not None else "there is none yet"
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return f"cannot write {folder / name} ({reason}); {kept}; make room and give the same command again to resume"
