"""What is measured while a model trains, on training steps only, from the forward pass that training makes anyway."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.activations import LearnableLeakyReLU
from normfree.probes import EntropyProbe
from normfree.probes.residual_stream import ResidualStreamProbe
from normfree.probes.sparsity_probe import SparsityProbe
from normfree.processes import largest
from normfree.training.objectives import Objective
from normfree.training.objectives.trainer import CROSS_ENTROPY
from normfree.training.records import RunRecords
from normfree.training.shards import own_part, whole

LOGGED_NAMES = {
    "loss": "train_loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "eval_loss": "eval_loss",
}
"""The Trainer's log entries that are recorded, and what they are called in ``metrics.parquet``."""

LearnedValue = tuple[int, int | None, str, float]
"""Layer, head (None for what the layer has one of), name and value, as ``layers.parquet`` has them."""


@dataclass
class _Probes:
    entropy: EntropyProbe
    residual: ResidualStreamProbe
    sparsity: SparsityProbe
    attached: contextlib.ExitStack


class Telemetry(TrainerCallback):
    """Records what the Trainer logs and, every ``telemetry_steps`` steps, the inside of the model.

    A row of step s in ``layers.parquet`` describes the weights after s updates, read on the batch of the next
    training step (all its micro-batches, all processes): ``entropy_nats`` by head (ReLU's Revival, Eq. 8, mean over
    query positions and sequences), ``scores_nan_count`` and ``scores_inf_count`` (attention scores),
    what :meth:`ResidualStreamProbe.by_layer` reads of the residual stream after the block (``residual_rms``,
    ``residual_kurtosis``, ``residual_max_over_median``, ``token_cosine_similarity``, NaN and Inf counts ...), what
    :meth:`SparsityProbe.by_layer` reads (``active_share`` of the neurons; ``attended_keys`` of sparse attention), and
    ``negative_slope`` where it is learned, and what the objective learns of each head: these also of the final weights.
    """

    def __init__(
        self,
        records: RunRecords,
        *,
        telemetry_steps: int,
        tokens_per_step: int,
        objective: Objective | None = None,
    ) -> None:
        self.records = records
        self.objective = objective
        self.logged_names = dict(LOGGED_NAMES)
        if objective is not None:
            self.logged_names |= {name: name for name in (CROSS_ENTROPY, *objective.term_names)}
        self.telemetry_steps = telemetry_steps
        self.tokens_per_step = tokens_per_step
        self._entropy: EntropyProbe | None = None
        self._probes: _Probes | None = None
        self._learned: list[LearnedValue] = []
        self._wall_seconds_before = 0.0
        self._start = 0.0
        self._step_start = 0.0
        self._seconds_in_steps = 0.0
        self._steps_timed = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.records.rewind(state.global_step)
        self._entropy = None
        self._wall_seconds_before = self.records.wall_seconds
        self._start = time.monotonic()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._step_start = time.monotonic()
        if state.global_step % self.telemetry_steps == 0:
            self._attach(kwargs["model"])

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._seconds_in_steps += time.monotonic() - self._step_start
        self._steps_timed += 1
        if self._probes is not None:
            self._record_layers(state.global_step - 1, self._probes)
            self.detach()
        if control.should_save:
            if all_finite(kwargs["model"]):
                self.records.flush()
            else:
                # The last good checkpoint stays the one to go on from.
                control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        for name, value in logs.items():
            if name in self.logged_names:
                self._add_metric(state, self.logged_names[name], value)
        if "loss" in logs and self._steps_timed:
            self._add_metric(
                state, "tokens_per_second", self._steps_timed * self.tokens_per_step / self._seconds_in_steps
            )
            self._seconds_in_steps, self._steps_timed = 0.0, 0
        if control.should_save:
            self.records.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for learned in self._learned_values(kwargs["model"]):
            self.records.add_layer(state.global_step, *learned)
        self.records.flush()

    def detach(self) -> None:
        """Takes the probes off the model; safe to call at any time."""
        if self._probes is not None:
            self._probes.attached.close()
            self._probes = None

    def _attach(self, model: NormfreeForCausalLM) -> None:
        with contextlib.ExitStack() as stack:
            # A compiled step would not run the probes' Python code.
            stack.enter_context(_uncompiled())
            if self._entropy is None:
                self._entropy = EntropyProbe(model, count_nonfinite=True)
            self._entropy.reset()
            entropy = stack.enter_context(self._entropy)
            residual = ResidualStreamProbe(model)
            stack.callback(residual.close)
            sparsity = stack.enter_context(SparsityProbe(model))
            self._learned = self._learned_values(model)
            self._probes = _Probes(entropy, residual, sparsity, stack.pop_all())

    def _record_layers(self, step: int, probes: _Probes) -> None:
        probes.entropy.reduce()
        probes.residual.reduce()
        probes.sparsity.reduce()
        entropy = probes.entropy.per_head().tolist()
        scores_nan, scores_inf = probes.entropy.nonfinite()
        by_layer = {
            "scores_nan_count": scores_nan.sum(dim=1),
            "scores_inf_count": scores_inf.sum(dim=1),
            **probes.residual.by_layer(),
            **probes.sparsity.by_layer(),
        }
        for layer, heads in enumerate(entropy):
            for head, value in enumerate(heads):
                self.records.add_layer(step, layer, head, "entropy_nats", value)
        for name, values in by_layer.items():
            for layer, value in enumerate(values.tolist()):
                self.records.add_layer(step, layer, None, name, value)
        for learned in self._learned:
            self.records.add_layer(step, *learned)

    def _learned_values(self, model: NormfreeForCausalLM) -> list[LearnedValue]:
        """The negative slope of each layer that learns one, and what the objective learns of each head."""
        values: list[LearnedValue] = [
            (layer, None, "negative_slope", whole(block.ffn.activation.negative_slope).item())
            for layer, block in enumerate(model.model.blocks)
            if isinstance(block.ffn.activation, LearnableLeakyReLU)
        ]
        of_heads = self.objective.head_values() if self.objective is not None else {}
        for name, table in of_heads.items():
            for layer, heads in enumerate(table.tolist()):
                values.extend((layer, head, name, value) for head, value in enumerate(heads))
        return values

    def _add_metric(self, state: TrainerState, name: str, value: float) -> None:
        wall_seconds = self._wall_seconds_before + time.monotonic() - self._start
        tokens = state.global_step * self.tokens_per_step
        self.records.add_metric(state.global_step, tokens, wall_seconds, name, value)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether every parameter of ``model`` is free of NaN and Inf, in every process; all of them have to come here."""
    is_finite = all(bool(own_part(parameter).isfinite().all()) for parameter in model.parameters())
    return largest(int(not is_finite)) == 0
