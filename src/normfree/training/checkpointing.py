"""Checkpoints that are there whole or not at all, know their own files again, and lose nothing of the logged loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from normfree.errors import RunFailedError
from normfree.files import write_text
from normfree.modeling.loading import LoadingReport
from normfree.processes import is_lost_connection, largest, process_index
from normfree.signals import note, noted
from normfree.training.run_folder import STATE_FILE, checkpoints, last_checkpoint, run_identity, step_of, write_manifest
from normfree.training.sharding import ShardingTrainer

PROGRESS_FILE = "progress.json"
"""The sums of the losses since the last log entry, in each checkpoint: without them the first entry after going on
would be a mean over fewer steps."""
CHECKPOINTS_KEPT = 2


class CheckpointingTrainer(ShardingTrainer):
    """The Trainer, with checkpoints that a kill cannot halve.

    A checkpoint is written beside its place, gets its manifest, and is moved there. The Trainer's own order by time is
    not used where older ones are removed: a clock that goes back would make it remove the newest.
    """

    _staging: Path | None = None

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains from the beginning, or from ``checkpoint`` as if nothing had happened."""
        self.add_callback(OwnRandomNumbers(checkpoint))
        if checkpoint is None:
            self.train()
            return
        if (checkpoint / PROGRESS_FILE).exists():
            content = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
            self.add_callback(_ResumeProgress(self, content))
        self.train(resume_from_checkpoint=str(checkpoint))

    def load_finished(self, checkpoint: Path) -> None:
        """Takes up a run that was stopped between its last checkpoint and its results: the Trainer would train on."""
        self._load_from_checkpoint(str(checkpoint))
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self._remove_older()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer goes on with what a checkpoint lacks as it was; here it is an error."""
        assert self.model is not None, "a Trainer is given one"
        missing = sorted({*load_result.missing_keys} - {*getattr(self.model, "all_tied_weights_keys", ())})
        report = LoadingReport(missing, sorted(load_result.unexpected_keys), [])
        report.check(f"the checkpoint in {self.args.output_dir}", cast(PreTrainedModel, self.model))

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial)) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / f".{name}"
        is_main = self.is_world_process_zero()
        try:
            if is_main:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._save_progress(self._staging / name)
            self.accelerator.wait_for_everyone()
            if is_main:
                write_manifest(self._staging / name, run_identity(folder))
                _move_into_place(self._staging / name, folder / name)
            self._remove_older()
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            if is_lost_connection(error):
                raise
            # What a full disk becomes in safetensors and in torch.save.
            raise RunFailedError(_not_saved(folder, name, error)) from error
        finally:
            if is_main:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _remove_older(self) -> None:
        """Leaves the newest checkpoints; ones of later steps belong to what is about to be trained again."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            older = [each for each in checkpoints(folder) if step_of(each) <= self.state.global_step]
            for each in older[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(each)

    def _save_progress(self, checkpoint: Path) -> None:
        sums = self.accelerator.reduce({"loss": self._tr_loss, **self._sums}, reduction="mean")
        if self.is_world_process_zero():
            content = {
                "last_logged_step": self._globalstep_last_logged,
                "n_steps": self._n_steps,
                "sums": {name: value.item() for name, value in sums.items()},
            }
            write_text(checkpoint / PROGRESS_FILE, json.dumps(content))


class StopWhenTold(TrainerCallback):
    """Saves a checkpoint and ends the training at the first step after a signal (see :mod:`normfree.signals`).

    A signal to one process is one to all: they stop at the same step.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signal = largest(noted())
        if signal:
            note(signal)
            control.should_save = control.should_training_stop = True


class OwnRandomNumbers(TrainerCallback):
    """Random numbers of its own for each process, which all begin with the same seed: dropout differs between them.

    Where ``checkpoint`` has the state of this process, the Trainer goes on from there. One that was written by another
    number of processes has not. A single process begins as it always did.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self._checkpoint = checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size == 1 and (self._checkpoint is None or (self._checkpoint / "rng_state.pth").exists()):
            return
        drawn = np.random.SeedSequence([args.seed, process_index(), state.global_step]).generate_state(1)
        set_seed(int(drawn[0]))


class _ResumeProgress(TrainerCallback):
    """Sets a trainer's sums at the only moment at which it does not reset them itself."""

    def __init__(self, trainer: CheckpointingTrainer, content: dict[str, Any]) -> None:
        self._trainer = trainer
        self._content = content

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer, sums = self._trainer, dict(self._content["sums"])
        trainer._tr_loss.fill_(sums.pop("loss"))
        trainer._globalstep_last_logged = self._content["last_logged_step"]
        trainer._n_steps = self._content["n_steps"]
        trainer._sums = {name: torch.tensor(value, device=args.device) for name, value in sums.items()}


def _move_into_place(new: Path, place: Path) -> None:
    if place.exists():
        # Damaged, or it would not be made again.
        shutil.rmtree(place)
    new.rename(place)


def _not_saved(folder: Path, name: str, error: Exception) -> str:
    last = last_checkpoint(folder)
    kept = f"{last.name} is the last good one" if last is not None else "there is none yet"
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return f"cannot write {folder / name} ({reason}); {kept}; make room and give the same command again to go on"
