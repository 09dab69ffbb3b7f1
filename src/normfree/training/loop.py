"""The training loop: from a configuration and packed tokens to a run folder.

:class:`Training` is one session of a run, from set-up (``__init__``) through all steps (``run``). Devices, processes
and trackers are accelerate's; autocast, loss scaling and DDP are torch's, as accelerate leaves out fp16 on a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from normfree.columns import EVAL_LOSS, TRAIN_LOSS
from normfree.data import PackedData
from normfree.errors import InputError, RunFailedError
from normfree.locks import locked, sweep
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED
from normfree.probes import EntropyRecorder
from normfree.processes import is_lost_connection, largest, n_processes, on_main
from normfree.signals import Interrupted, deferred, note, noted
from normfree.training.callback import Callback, RunState
from normfree.training.checkpoint import (
    Checkpointed,
    load_progress,
    remove_older,
    restore_random_numbers,
    save_checkpoint,
)
from normfree.training.claim import check_claim, claim
from normfree.training.distributed import averaging, check_sharding, shard, whole
from normfree.training.evaluation import mean_loss, shared_losses
from normfree.training.half_precision import autocast, float32_accumulation
from normfree.training.heap import keep_freed_memory
from normfree.training.lora import Adapters
from normfree.training.nonfinite import REWINDS, NonfiniteError, all_finite, halted, nonfinite
from normfree.training.objectives import CROSS_ENTROPY, DIVERGENCE, Objective
from normfree.training.optimizer import adamw, learning_rates
from normfree.training.order import TrainingOrder, load_rewinds, save_rewinds
from normfree.training.pretrained import starting_model
from normfree.training.recipe import Recipe
from normfree.training.records import RunRecords
from normfree.training.result import RunResult, load_result, measure
from normfree.training.run_config import RunConfig
from normfree.training.run_folder import RESULTS_FILE, last_checkpoint, step_of
from normfree.training.telemetry import Telemetry, recorded_probes
from normfree.training.trackers import accelerator_for, begin_tracking, end_tracking
from normfree.training.training_plan import TrainingPlan

log = logging.getLogger(__name__)

LOSS = "loss"
WORKERS = 0
"""Processes that read batches: they are in memory or mapped into it."""

Intervention = Callable[[NormfreeForCausalLM], tuple[Objective, Callback]]
"""Changes the model of a run in place before it trains; returns the objective and the callback that go with it."""


def train(
    config: RunConfig,
    data: PackedData,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    intervene: Intervention | None = None,
) -> RunResult:
    """Trains ``config`` in ``folder``, resumes from its last checkpoint, or returns what it finished earlier.

    The folder then holds ``config.yaml``, ``metrics.parquet``, ``layers.parquet``, ``sequence_losses.parquet``,
    ``head_entropy.parquet``, the last checkpoints, and ``results.csv``, whose presence says that the run is finished.
    ``recipe.on_nonfinite`` decides what follows a loss that is not finite: with ``record`` the run continues to its
    end, keeps its last good checkpoint, and has the status ``diverged``.

    Raises:
        InputError: the folder holds a run of another configuration or is in use by another process, the data are too
            few for one batch, or the recipe or objective cannot be followed.
        RunFailedError: a checkpoint cannot be written, or the loss or a gradient is not finite and the recipe stops
            the run.
    """
    if config.objective is not None and intervene is not None:
        raise InputError(f"the objective {config.objective.kind} cannot be combined with another intervention")
    if intervene is not None and n_processes() > 1:
        raise InputError("a model that is changed while it trains is trained by one process; start one only")
    config.recipe.check(config.data.sequence_length)
    check_data(data, config.recipe)
    if config.objective is not None:
        config.objective.check_data(data, folder)
    # transformers' own bars (one for each checkpoint) would break up those of a study.
    disable_progress_bar()
    on_main(lambda: check_claim(folder, config, data))
    if _is_finished(folder):
        on_main(lambda: sweep(folder))
        return load_result(folder)
    with contextlib.ExitStack() as stack:
        on_main(lambda: _enter(stack, folder))
        # Another process may have finished it before this one had the lock.
        while not _is_finished(folder):
            try:
                with Training(config, data, folder, callbacks, intervene) as training:
                    training.run()
                    return training.measure()
            except NonfiniteError as error:
                on_main(partial(_rewind, config, data, folder, error))
            except (RuntimeError, Interrupted) as error:
                # The launcher of a process that is gone sends SIGTERM to the others, perhaps while they end already.
                if is_lost_connection(error) or is_lost_connection(error.__context__):
                    raise RunFailedError(
                        f"another of the {n_processes()} processes of this run is gone; the same command resumes from "
                        "the last checkpoint"
                    ) from error
                raise
        return load_result(folder)


class Training:
    """One session of a run, a context manager: everything it needs, and its steps."""

    def __init__(
        self,
        config: RunConfig,
        data: PackedData,
        folder: Path,
        callbacks: Sequence[Callback],
        intervene: Intervention | None,
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.recipe = recipe = config.recipe
        length = config.data.sequence_length

        gc.collect()  # frees the model of an earlier run in this process, which is part of reference cycles
        keep_freed_memory()

        # What trains, and what is minimized. Nothing is written before all of it has been checked.
        set_seed(config.seed)
        self.model = model = _model(config, data)
        self.adapters = Adapters(model, config.lora) if config.lora is not None else None
        self.objective = config.build_objective(model.config, folder)
        self.callbacks = list(callbacks)
        if intervene is not None:
            self.objective, callback = intervene(model)
            self.callbacks.insert(0, callback)
        if recipe.is_sharded:
            check_sharding(config, model.config, self.objective)
        model.set_attn_implementation(recipe.attn_implementation)
        model.config.use_cache = False  # no pass continues another
        on_main(lambda: claim(folder, config, data))

        # Where it trains. Training draws its random numbers from the seed anew.
        self.accelerator = accelerator_for(config, folder)
        self.device = self.accelerator.device
        set_seed(config.seed)
        self._place()
        self.learned = list(self.objective.learned.values()) if self.objective is not None else []
        self.optimizer = adamw(model, recipe, self.learned)
        self.schedule = learning_rates(self.optimizer, recipe, length)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.autocast = partial(autocast, recipe.precision, self.device, cache=not recipe.is_sharded)

        # What is read, recorded and saved.
        self.rewinds = load_rewinds(folder)
        self.order = TrainingOrder(len(data.train), recipe.batch_size, config.seed, self.rewinds)
        self.n_predicted = data.train.n_predicted() if data.train.predicted is not None else None
        plan = TrainingPlan.of(recipe, length, model)
        self.state = RunState(model, RunRecords(folder), plan.steps, plan=plan)
        self.telemetry = Telemetry(
            self.state.records,
            recorded_probes(model, self.objective, recipe.probes),
            every=recipe.telemetry_steps,
            tokens_per_step=recipe.batch_size * length,
        )
        optimization = self.optimizer, self.schedule, self.scaler
        self.checkpointed = Checkpointed(
            model, data.tokenizer, *optimization, self.objective, self.adapters, recipe.is_sharded
        )
        self.sums: dict[str, Tensor] = {}
        self.last_logged_step = 0

    def _place(self) -> None:
        """Puts the model on its device: sharded, or with DDP around it, and compiled, as the recipe asks for."""
        recipe, model = self.recipe, self.model
        if recipe.gradient_checkpointing:
            # Renamed in transformers 5.23; both names work over the supported range.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if recipe.is_sharded:
            shard(model)
        model.to(self.device)
        if self.objective is not None:
            self.objective.to(self.device)
        trained = averaging(model, recipe, self.device)
        # DDP's; a sharded model sends the gradients of every micro-batch.
        self.no_sync: Callable[[], Any] = getattr(trained, "no_sync", contextlib.nullcontext)
        self.forward: Callable[..., Any] = lambda **inputs: trained(**inputs)
        if recipe.torch_compile:
            self.forward = torch.compile(self.forward)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.telemetry.close()
        end_tracking(self.accelerator)

    def run(self) -> None:
        """Takes every step that is left, from the last checkpoint to the end of the budget or a signal.

        Raises:
            Interrupted: a signal asked to stop; the run was saved.
            NonfiniteError: see ``recipe.on_nonfinite``.
        """
        recipe, run, optimizer = self.recipe, self.state, self.optimizer
        with float32_accumulation(recipe.precision, self.device), _deterministic(), deferred():
            self._resume()
            self._begin()
            batches = self._batches(run.step)
            is_stopped = False
            while run.step < run.n_steps and not is_stopped:
                # Forward and backward passes of this process's micro-batches; the last one averages the gradients.
                self.telemetry.begin_step(run.step)
                for each in self.callbacks:
                    each.begin_step(run)
                self.model.train()
                n_predicted = self._n_predicted(run.step)
                loss = torch.zeros((), device=self.device)
                for left in reversed(range(recipe.accumulation_steps)):
                    with self.no_sync() if left else contextlib.nullcontext():
                        loss += self.micro_step(next(batches), n_predicted)

                # Clipping, and the update, which a loss scale that was too large skips.
                for parameter in self.learned:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
                self.scaler.unscale_(optimizer)
                grad_norm = self.clip()
                if recipe.on_nonfinite != "record":
                    bad = nonfinite(loss, self.model.parameters(), scaled=self.scaler.is_enabled())
                    if bad is not None:
                        run.records.flush()
                        raise NonfiniteError(run.step + 1, bad)
                self.scaler.step(optimizer)
                self.scaler.update()
                learning_rate = float(self.schedule.get_last_lr()[0])
                self.schedule.step()
                optimizer.zero_grad()
                run.step += 1

                # What is due: signals reach all processes at the same step, and only finite weights are saved.
                is_stopped = _is_told_to_stop()
                is_last = run.step == run.n_steps
                is_saved = is_stopped or is_last or run.step % recipe.save_steps == 0
                if is_saved and not all_finite(self.model):
                    if recipe.on_nonfinite != "record":
                        raise NonfiniteError(run.step, "model")
                    is_saved = False
                self.telemetry.end_step()
                for each in self.callbacks:
                    each.end_step(run)
                if run.step % recipe.logging_steps == 0:
                    self.log_training(grad_norm, learning_rate)
                if is_last or run.step % recipe.eval_steps == 0:
                    losses = shared_losses(self.model, self.data.eval, recipe, self.accelerator)
                    self.log({EVAL_LOSS: mean_loss(losses, self.data.eval.n_predicted())})
                if is_saved:
                    self.save()
            self.telemetry.finish(run.step)
            for each in self.callbacks:
                each.finish(run)

    def micro_step(self, inputs: dict[str, Tensor], n_predicted: Tensor) -> Tensor:
        """The forward and backward pass of a micro-batch; returns its part of the loss, a scalar in nats.

        ``n_predicted`` counts the predicted tokens of the whole step: cross-entropy and terms have the weight in it
        that this micro-batch's predicted tokens have among them, so that neither accumulation nor the number of
        processes changes the sum.
        """
        objective = self.objective
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        recorder = EntropyRecorder(self.model) if objective is not None and objective.reads_entropy else None
        lesson = soft_targets = None
        if objective is not None:
            with self.autocast():
                lesson = objective.lesson(inputs["input_ids"])
            soft_targets = None if lesson is None else lesson.soft_targets
        with recorder or contextlib.nullcontext(), self.autocast():
            outputs = self.forward(
                **inputs, num_items_in_batch=n_predicted, return_logits=False, soft_targets=soft_targets
            )
        # DDP takes the mean of the gradients of all processes, where the sum is meant.
        loss = outputs.loss * n_processes()
        if objective is not None:
            with self.autocast():
                terms = objective.terms(recorder.per_head() if recorder is not None else None, lesson)
            share = (inputs["labels"][:, 1:] != NOT_PREDICTED).sum() * n_processes() / n_predicted
            for name, term in terms.items():
                loss = loss + share * term.weight * term.value
                self._add(name, share * term.value)
            for name, values in ((CROSS_ENTROPY, outputs.token_losses), (DIVERGENCE, outputs.token_divergences)):
                if values is not None:
                    self._add(name, values.sum() * n_processes() / n_predicted)
        self._add(LOSS, loss)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def clip(self) -> Tensor:
        """Clips the model's gradients to ``recipe.max_grad_norm``; returns their norm before, a scalar."""
        return whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm))

    def log_training(self, grad_norm: Tensor, learning_rate: float) -> None:
        """Logs the means of loss and terms over the steps since the last entry, and the readings of this step."""
        n_steps = self.state.step - self.last_logged_step
        means = {name: total / n_steps for name, total in self._totals().items()}
        entries = {TRAIN_LOSS: means.pop(LOSS), "grad_norm": grad_norm.item(), "learning_rate": learning_rate}
        self.log(entries | means | self.telemetry.speed())
        self.sums, self.last_logged_step = {}, self.state.step

    def log(self, entries: Mapping[str, float]) -> None:
        """Records ``entries`` at the current step, and passes them on to callbacks and tracker."""
        self.telemetry.log(self.state.step, entries)
        for each in self.callbacks:
            each.log(self.state, entries)
        self.accelerator.log(dict(entries), step=self.state.step)

    def save(self) -> None:
        """Writes the telemetry, and a checkpoint. Collective."""
        self.state.records.flush()
        progress = {"last_logged_step": self.last_logged_step, "sums": self._totals()}
        save_checkpoint(self.folder, self.state.step, self.checkpointed, progress)

    def measure(self) -> RunResult:
        """Evaluates the trained model and finishes the run's folder. Collective."""
        if self.adapters is not None:
            self.adapters.merge()
        with float32_accumulation(self.recipe.precision, self.device):
            return measure(self.model, self.config, self.data, self.folder, self.accelerator)

    def _resume(self) -> None:
        checkpoint = on_main(partial(last_checkpoint, self.folder))
        if checkpoint is not None:
            step = self.state.step = step_of(checkpoint)
            for each in self.callbacks:
                each.resume(self.state)
            self.checkpointed.load(checkpoint)
            on_main(partial(remove_older, self.folder, step))
            progress = load_progress(checkpoint)
            self.last_logged_step = progress.get("last_logged_step", step)
            self.sums = {
                name: torch.tensor(value, device=self.device) for name, value in progress.get("sums", {}).items()
            }
        restore_random_numbers(checkpoint, self.config.seed, self.state.step)

    def _begin(self) -> None:
        step = self.state.step
        self.telemetry.begin(step)
        begin_tracking(self.accelerator, self.config, self.folder, step)
        if any(each.to_step == step for each in self.rewinds):
            self.telemetry.log(step + 1, {REWINDS: float(len(self.rewinds))})
        for each in self.callbacks:
            each.begin(self.state)

    def _batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches, without end, from those of ``step``."""
        while True:
            # A loader draws a random number when it starts: that of a resumed epoch did so before the checkpoint.
            generator = None if self.order.begins_epoch(step) else torch.Generator()
            yield from DataLoader(
                self.data.train,
                batch_sampler=self.order.micro_batches(step, self.recipe.device_batch_size),
                collate_fn=default_data_collator,
                num_workers=WORKERS,
                pin_memory=self.device.type == "cuda",
                generator=generator,
            )
            step += self.order.steps_per_epoch - step % self.order.steps_per_epoch

    def _n_predicted(self, step: int) -> Tensor:
        """Predicted tokens of a step, in all processes: a float32 scalar."""
        if self.n_predicted is None:
            n_predicted = self.recipe.batch_size * (self.config.data.sequence_length - 1)
        else:
            n_predicted = self.n_predicted[self.order.step(step)].sum()
        return torch.tensor(float(n_predicted), device=self.device)

    def _add(self, name: str, value: Tensor) -> None:
        before = self.sums.get(name)
        self.sums[name] = value.detach() if before is None else before + value.detach()

    def _totals(self) -> dict[str, float]:
        """The sums since the last log entry, mean over the processes. Collective; waits for the device."""
        if not self.sums:
            return {}
        sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), reduction="mean")
        return dict(zip(self.sums, sums.tolist(), strict=True))


def check_data(data: PackedData, recipe: Recipe) -> None:
    """Checks that the training split holds at least one batch.

    Raises:
        InputError: it does not.
    """
    if len(data.train) < recipe.batch_size:
        raise InputError(
            f"the training split has {len(data.train)} sequences, fewer than one batch of {recipe.batch_size}; "
            "give a larger corpus, or lower recipe.batch_size"
        )


def _is_finished(folder: Path) -> bool:
    return on_main((folder / RESULTS_FILE).exists)


def _enter(stack: contextlib.ExitStack, folder: Path) -> None:
    stack.enter_context(locked(folder))


def _model(config: RunConfig, data: PackedData) -> NormfreeForCausalLM:
    if config.start_from is not None:
        return starting_model(config.start_from, data)
    vocab_size: int = data.statistics["vocab_size"]
    return NormfreeForCausalLM(config.build_model_config(vocab_size, data.tokenizer.eos_token_id))


def _is_told_to_stop() -> bool:
    """True after a signal to any process, in all of them (see :mod:`normfree.signals`). Collective."""
    signal = largest(noted())
    if signal:
        note(signal)
    return signal != 0


def _rewind(config: RunConfig, data: PackedData, folder: Path, error: NonfiniteError) -> None:
    """Notes that the run returns to its last checkpoint and skips the batches that led to ``error``.

    Raises:
        RunFailedError: it may not, or no longer.
    """
    recipe, rewinds, checkpoint = config.recipe, load_rewinds(folder), last_checkpoint(folder)
    if recipe.on_nonfinite == "halt" or len(rewinds) == recipe.max_rewinds:
        raise halted(error, checkpoint, recipe.on_nonfinite, len(rewinds)) from error
    step = step_of(checkpoint) if checkpoint is not None else 0
    rewind = TrainingOrder(len(data.train), recipe.batch_size, config.seed).rewind(error.step, step)
    save_rewinds(folder, [*rewinds, rewind])
    log.warning("%s; back to step %d, without the %d sequences that led there", error, step, rewind.skipped)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """On CUDA, kernels that add in a fixed order, where they exist; on a CPU all do."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
