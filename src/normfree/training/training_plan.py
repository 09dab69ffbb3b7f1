"""What a training run will take, before it begins: steps, tokens, memory, and time by a trial of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from normfree.devices import default_device
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.processes import n_processes
from normfree.timing import seconds_once
from normfree.training.half_precision import autocast, float32_accumulation
from normfree.training.recipe import Recipe

LONG_TRIAL = 5.0
"""Seconds of a trial after which it is not repeated: what it takes to warm up no longer matters."""
CPU_TRIAL_TOKENS = 2048
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class TrainingPlan:
    """The cost of one run.

    steps: optimizer steps.
    batch_size, sequence_length: sequences of a step, and their tokens.
    parameters: of the model; ``trained`` of them have gradients.
    memory_bytes: an estimate for each device, of weights, gradients, optimizer and the activations of a micro-batch.
    """

    steps: int
    batch_size: int
    sequence_length: int
    parameters: int
    trained: int
    memory_bytes: int

    @classmethod
    def of(cls, recipe: Recipe, sequence_length: int, model: NormfreeForCausalLM) -> TrainingPlan:
        """The cost of training ``model``, which may be on the device meta, by ``recipe``."""
        parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
        # float32 weights; gradients and two moments of what is trained.
        held = 4 * parameters + 12 * trained
        if recipe.is_sharded:
            held //= n_processes()
        activations = recipe.device_batch_size * sequence_length * _bytes_a_token(model.config, recipe)
        steps = recipe.n_steps(sequence_length)
        return cls(steps, recipe.batch_size, sequence_length, parameters, trained, held + activations)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.batch_size * self.sequence_length

    @property
    def operations(self) -> float:
        """Floating-point operations: 6 for each parameter and token."""
        return 6.0 * self.parameters * self.tokens

    def __str__(self) -> str:
        trained = "" if self.trained == self.parameters else f" ({self.trained:,} trained)"
        return (
            f"{self.steps:,} steps of {self.batch_size} x {self.sequence_length} tokens = {self.tokens:,} tokens, "
            f"{self.parameters:,} parameters{trained}, about {memory(self.memory_bytes)}"
        )


def memory(n_bytes: float) -> str:
    """``2.3 GiB``, or ``120 MiB`` below one GiB."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{max(1, round(n_bytes / MIB))} MiB"


def _bytes_a_token(config: NormfreeConfig, recipe: Recipe) -> int:
    """Activations that the backward pass keeps of a token: about 8 widths and 2 inner widths a block, or the stream."""
    inner = (3 if config.ffn != "dense" else 2) * config.n_inner
    block = 8 * config.n_embd + inner
    n_number = config.n_layer * (config.n_embd if recipe.gradient_checkpointing else block) + block
    return n_number * (4 if recipe.precision == "fp32" else 2)


def planned_model(config: NormfreeConfig) -> NormfreeForCausalLM:
    """A model without memory for its weights, to count them."""
    with torch.device("meta"):
        return NormfreeForCausalLM(config)


def seconds_a_step(recipe: Recipe, sequence_length: int, model: NormfreeForCausalLM) -> float:
    """Seconds of an optimizer step, from forward and backward passes of one micro-batch of random tokens.

    On a CPU, where time grows with the tokens, a few sequences of it are enough. The model's mode and the random
    numbers of torch are restored; its gradients are removed.
    """
    device, was_training = model.device, model.training
    n = recipe.device_batch_size
    if device.type == "cpu":
        n = min(n, max(1, CPU_TRIAL_TOKENS // sequence_length))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), float32_accumulation(recipe.precision, device):
        tokens = torch.randint(model.config.vocab_size, (n, sequence_length), device=device)
        model.train()
        seconds = _trial(model, tokens, recipe)
        if seconds < LONG_TRIAL:
            seconds = _trial(model, tokens, recipe)
    model.train(was_training)
    model.zero_grad()
    return seconds * recipe.accumulation_steps * recipe.device_batch_size / n


def _trial(model: NormfreeForCausalLM, tokens: torch.Tensor, recipe: Recipe) -> float:
    def step() -> None:
        with autocast(recipe.precision, model.device):
            loss = model(input_ids=tokens, labels=tokens, return_logits=False).loss
        loss.backward()

    return seconds_once(step, model.device)


def trial_model(config: NormfreeConfig) -> NormfreeForCausalLM:
    """A model of this configuration on the default device, to try steps with; random numbers are as before."""
    device = default_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model: Any = NormfreeForCausalLM(config)
    trial: NormfreeForCausalLM = model.to(device)
    return trial
