"""Training of a model that is shared out over several processes: ``recipe.sharding: full``.

The Trainer's own way to FSDP goes through accelerate, which leaves it out on a CPU without a word, computes norms and
residual stream in half precision, and writes other checkpoints. Here the model is sharded before the Trainer has it:
the arithmetic is that of one process, and so are the files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.training.configuration import RunConfig
from normfree.training.objectives import Objective
from normfree.training.objectives.trainer import ObjectiveTrainer
from normfree.training.shards import (
    load_whole_model,
    load_whole_optimizer_state,
    shard,
    whole,
    whole_model_state,
    whole_optimizer_state,
)


class ShardingTrainer(ObjectiveTrainer):
    """The Trainer, for a model that is ``sharded`` over the processes, or not.

    Weights in a checkpoint are those of one model, and optimizer states those of one optimizer, both written by the
    main process; they are shared out again when a run goes on, over as many processes as there are then.
    """

    _whole_state: dict[str, Any] | None = None

    def __init__(self, *, model: nn.Module, sharded: bool = False, **options: Any) -> None:
        self.sharded = sharded
        if sharded:
            shard(model)
        super().__init__(model=model, **options)
        if sharded:
            # It would wrap the model once more, into DDP. Precision and compilation are left to it.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
            # A cache would keep the weights of all blocks in half precision until the end of the forward pass.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
            clip = self.accelerator.clip_grad_norm_
            self.accelerator.clip_grad_norm_ = lambda *arguments, **named: whole(clip(*arguments, **named))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            assert self.model is not None, "a Trainer is given one"
            load_whole_model(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.sharded:
            assert self.model is not None, "a Trainer is given one"
            # Here, where all processes come: in transformers 5.17 only the main one goes on to what it calls.
            self._whole_state = whole_model_state(self.model)
        super().save_model(output_dir, _internal_call)
        self._whole_state = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, self._whole_state or state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None, "a model that trains has one"
        assert self.lr_scheduler is not None, "a model that trains has one"
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None, "a model that trains has one"
        assert self.lr_scheduler is not None, "a model that trains has one"
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        load_whole_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def check_sharding(config: RunConfig, model: NormfreeConfig, objective: Objective | None) -> None:
    """Whether a run can be sharded.

    Raises:
        InputError: it cannot, and why.
    """
    reasons = {
        "lora, whose adapters are merged into whole weights": config.lora is not None,
        "an objective that learns parameters of its own": objective is not None and len(objective.learned) > 0,
        "one slope for all layers (model.slope_sharing global), which belongs to no layer": (
            model.slope_sharing == "global"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"recipe.sharding full does not go with {reason}; set recipe.sharding to none")
