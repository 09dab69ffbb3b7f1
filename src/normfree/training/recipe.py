"""How a model is trained: optimizer, schedule, budget, precision, and what is measured on the way."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from normfree.errors import InputError, unknown_name
from normfree.probes.optional import optional_probes
from normfree.processes import n_processes

OnNonfinite = Literal["record", "halt", "rewind"]
Precision = Literal["fp32", "bf16", "fp16"]
Sharding = Literal["none", "full"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
LAUNCHER_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""What ``accelerate launch`` sets where its own configuration asks for it."""


def fitting_micro_batch_size(batch_size: Any, most: Any) -> Any:
    """The largest divisor of ``batch_size`` up to ``most``; ``most`` itself if either is no number above 0."""
    if type(batch_size) is not int or type(most) is not int or batch_size < 1 or most < 1:
        return most  # validation says what is wrong
    return next(size for size in range(min(batch_size, most), 0, -1) if batch_size % size == 0)


class Recipe(BaseModel):
    """The training recipe; the defaults are those of ReLU's Revival and of its public code.

    Weight decay acts on weights and, as in the public code, on learnable slopes (``decay_slopes``), never on norms and
    biases.

    The learning rate rises over ``warmup_steps``, or over ``warmup_ratio`` of the budget. Then it falls to
    ``final_learning_rate_ratio`` of itself, along half a cosine or in a straight line (to 0 only). ``decay_steps`` is
    the step at which it gets there, counted from the first; default: the last. A larger one stops training midway
    through the decay.

    A budget is given either in ``steps`` (optimizer steps) or in ``tokens``, which is rounded down to whole steps.
    ``batch_size`` counts the sequences of one optimizer step over all devices; a device holds at most
    ``micro_batch_size`` of them at a time and accumulates the rest. By
    default it is the largest divisor of ``batch_size`` up to 128.

    Where several processes train one model, ``sharding`` says what each of them holds: with ``none`` all weights,
    gradients and optimizer states (DDP), with ``full`` its share of them (FSDP). One process has nothing to share.

    Telemetry reads the model every ``telemetry_steps`` steps, by the probes of every run and by those that ``probes``
    names (:mod:`normfree.probes.optional`).

    ``on_nonfinite`` says what follows a NaN or infinite loss or gradient: ``record`` continues and records it,
    ``halt`` stops the run, ``rewind`` goes back to the last checkpoint and past the batches that led there, at most
    ``max_rewinds`` times in a run. Weights that are not finite never get into a checkpoint.

    ``report_to`` names a tracker that receives the rows of ``metrics.parquet`` as they are logged: TensorBoard (in the
    run's folder ``tensorboard``), W&B or Trackio (project ``normfree``). A resumed run continues its tracker's run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    batch_size: int = Field(512, ge=1)
    micro_batch_size: int = Field(128, ge=1)

    learning_rate: float = Field(1e-3, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    learning_rate_decay: Literal["linear", "cosine"] = "linear"
    final_learning_rate_ratio: float = Field(0.0, ge=0, lt=1)
    decay_steps: int | None = Field(None, ge=1)
    weight_decay: float = Field(0.1, ge=0)
    decay_slopes: bool = True
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)

    precision: Precision = "fp16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    torch_compile: bool = False
    gradient_checkpointing: bool = False
    sharding: Sharding = "none"

    telemetry_steps: int = Field(100, ge=1)
    probes: tuple[str, ...] = ()
    logging_steps: int = Field(10, ge=1)
    eval_steps: int = Field(500, ge=1)
    save_steps: int = Field(500, ge=1)
    report_to: Tracker = "none"

    on_nonfinite: OnNonfinite = "record"
    max_rewinds: int = Field(3, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fit_micro_batch(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "batch_size" not in content or "micro_batch_size" in content:
            return content
        most = cls.model_fields["micro_batch_size"].default
        return {**content, "micro_batch_size": fitting_micro_batch_size(content["batch_size"], most)}

    @field_validator("probes")
    @classmethod
    def _check_probes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = optional_probes() if names else {}
        for name in names:
            if name not in known:
                raise unknown_name("probe", name, sorted(known))
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _check_batch(self) -> Recipe:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        if self.learning_rate_decay == "linear" and self.final_learning_rate_ratio:
            raise ValueError(
                f"final_learning_rate_ratio ({self.final_learning_rate_ratio:g}) is for learning_rate_decay cosine; "
                "linear decay goes to 0"
            )
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give the budget as steps or as tokens: exactly one of the two")
        return self

    def n_steps(self, sequence_length: int) -> int:
        """Optimizer steps within the budget.

        Raises:
            InputError: the budget is smaller than one step.
        """
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None, "the validator asks for one of the two"
        steps = self.tokens // (self.batch_size * sequence_length)
        if steps < 1:
            raise InputError(
                f"recipe.tokens is {self.tokens}, less than one step of {self.batch_size} sequences of "
                f"{sequence_length} tokens = {self.batch_size * sequence_length}; raise it, or lower batch_size"
            )
        return steps

    def n_warmup_steps(self, sequence_length: int) -> int:
        """Steps over which the learning rate rises from 0; a ``warmup_ratio`` of the budget is rounded up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(round(self.warmup_ratio * self.n_steps(sequence_length), 6))

    def n_decay_steps(self, sequence_length: int) -> int:
        """Steps from the first until the learning rate is at its end, warm-up included."""
        return self.n_steps(sequence_length) if self.decay_steps is None else self.decay_steps

    def n_tokens(self, sequence_length: int) -> int:
        """Tokens trained on: whole steps only."""
        return self.n_steps(sequence_length) * self.batch_size * sequence_length

    def check(self, sequence_length: int) -> None:
        """Checks that this machine and these processes can follow the recipe.

        Raises:
            InputError: the budget is smaller than a step, ``decay_steps`` ends before it or before the warm-up, the
                batch does not divide over the processes, their launcher asks for a sharding of its own, or the
                tracker's package is not installed.
        """
        steps, warmup = self.n_steps(sequence_length), self.n_warmup_steps(sequence_length)
        if self.decay_steps is not None and self.decay_steps < max(steps, warmup + 1):
            raise InputError(
                f"recipe.decay_steps is {self.decay_steps}, before the end of the budget ({steps} steps) or of the "
                f"warm-up ({warmup}); raise it or leave it out"
            )
        if self.batch_size % n_processes():
            raise InputError(
                f"recipe.batch_size ({self.batch_size}) does not divide over {n_processes()} processes; start a number "
                "of them that divides it, or change it"
            )
        if any(os.environ.get(name, "false").lower() == "true" for name in LAUNCHER_SHARDING):
            raise InputError(
                "accelerate's own configuration asks for FSDP or DeepSpeed; leave that out, and set recipe.sharding to "
                "full"
            )
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise InputError(
                f"recipe.report_to {self.report_to} needs the package {self.report_to}; install it with: "
                f"pip install {self.report_to}, or set recipe.report_to to none"
            )

    @property
    def is_sharded(self) -> bool:
        """True if each process holds only its share of the model."""
        return self.sharding == "full" and n_processes() > 1

    @property
    def device_batch_size(self) -> int:
        """Sequences that a device holds at a time: the largest divisor of its share up to ``micro_batch_size``."""
        share = self.batch_size // n_processes()
        return next(size for size in range(min(share, self.micro_batch_size), 0, -1) if share % size == 0)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a device in one step."""
        return self.batch_size // (self.device_batch_size * n_processes())
