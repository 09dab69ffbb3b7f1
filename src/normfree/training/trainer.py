"""One training run: from a configuration and packed tokens to a run folder."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PrinterCallback, TrainerCallback, default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from normfree.data import PackedData
from normfree.errors import InputError, RunFailedError
from normfree.files import write_text
from normfree.locks import locked, sweep
from normfree.modeling import NormfreeForCausalLM
from normfree.probes import EntropyProbe
from normfree.processes import is_lost_connection, n_processes, on_main
from normfree.signals import deferred
from normfree.training.checkpointing import StopWhenTold
from normfree.training.claim import check_claim, claim
from normfree.training.configuration import RunConfig
from normfree.training.evaluating import EvaluatingTrainer
from normfree.training.evaluation import mean_loss, perplexity
from normfree.training.half_precision import float16_on_cpu
from normfree.training.lora import Adapters
from normfree.training.nonfinite import (
    Batches,
    NonfiniteError,
    NonfiniteWatch,
    RecordRewinds,
    TrainingOrder,
    halted,
    load_rewinds,
    save_rewinds,
)
from normfree.training.objectives import Objective
from normfree.training.pretrained import starting_model
from normfree.training.recipe import Recipe
from normfree.training.records import RunRecords, read_parquet, write_parquet
from normfree.training.run_folder import RESULTS_FILE, last_checkpoint, step_of
from normfree.training.sharding import check_sharding
from normfree.training.telemetry import Telemetry, all_finite, logged_terms, recorded_probes
from normfree.training.telemetry_callback import TelemetryCallback

log = logging.getLogger(__name__)

SEQUENCE_LOSSES_FILE = "sequence_losses.parquet"
HEAD_ENTROPY_FILE = "head_entropy.parquet"


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured on the evaluation tokens, as read back from its folder.

    row: one row of ``results.csv``.
    sequence_losses: sequence, loss_nats (mean over its predicted tokens).
    head_entropy: layer, head, entropy_nats.
    """

    folder: Path
    row: dict[str, Any]
    sequence_losses: pd.DataFrame
    head_entropy: pd.DataFrame


class NormfreeTrainer(EvaluatingTrainer):
    """The Trainer with an objective, and with a say in whether weight decay pulls learnable slopes towards zero.

    Its logged loss is finite again after a step whose loss was not. With ``adapters`` a checkpoint is a model without
    them, that loads like any other, and has them beside it to go on from. ``watch`` sees every loss, and ``order`` is
    used in place of the Trainer's own order of the training sequences.
    """

    def __init__(
        self,
        *,
        decay_slopes: bool,
        decay_steps: int | None = None,
        adapters: Adapters | None = None,
        watch: NonfiniteWatch | None = None,
        order: TrainingOrder | None = None,
        **options: Any,
    ) -> None:
        self.decay_slopes = decay_slopes
        self.decay_steps = decay_steps
        self.adapters = adapters
        self.watch = watch
        self.order = order
        super().__init__(**options)
        if watch is not None:
            watch.trainer = self

    def training_step(self, *inputs: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*inputs, **options)
        if self.watch is not None:
            self.watch.see(loss)
        return loss

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return super()._get_train_sampler(*arguments) if self.order is None else self.order

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The decay may be longer than the training; see :class:`~normfree.training.Recipe`."""
        return super().create_scheduler(self.decay_steps or num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if self.decay_slopes or not name.endswith(".negative_slope")]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            # The Trainer takes the sum it has logged away from itself, and NaN - NaN is NaN in every later step.
            self._tr_loss.zero_()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.adapters is None:
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, self.adapters.plain_state())
        if self.args.should_save:
            self.adapters.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.adapters is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.adapters.load(Path(resume_from_checkpoint))


Intervention = Callable[[NormfreeForCausalLM], tuple[Objective, TrainerCallback]]
"""Changes the model of a run in place before it trains, and gives the objective and the callback that go with it."""


def train(
    config: RunConfig,
    data: PackedData,
    folder: Path,
    *,
    callbacks: tuple[TrainerCallback, ...] = (),
    intervene: Intervention | None = None,
) -> RunResult:
    """Trains ``config`` in ``folder``, goes on from its last checkpoint, or returns what it finished earlier.

    The folder then holds ``config.yaml``, ``metrics.parquet``, ``layers.parquet``, ``sequence_losses.parquet``,
    ``head_entropy.parquet``, the last checkpoints, and ``results.csv``, whose presence says that the run is
    finished. What becomes of a run whose loss stops being finite, ``recipe.on_nonfinite`` says: with ``record`` it goes
    on to its end, with its last good checkpoint kept, and has the status ``diverged``.

    Raises:
        InputError: the folder holds a run of another configuration or is in use by another process, the data are too
            few for one batch, or the objective cannot be followed.
        RunFailedError: a checkpoint cannot be written, or the loss or a gradient is not finite and the run may not go
            on.
    """
    if config.objective is not None and intervene is not None:
        raise InputError(f"the objective {config.objective.kind} cannot be combined with another intervention")
    if intervene is not None and n_processes() > 1:
        raise InputError("a model that is changed while it trains is trained by one process; start one only")
    config.recipe.check(config.data.sequence_length)
    check_data(data, config.recipe)
    if config.objective is not None:
        config.objective.check_data(data, folder)
    # transformers' own bars (one for each checkpoint) would break up ours.
    disable_progress_bar()
    on_main(lambda: check_claim(folder, config, data))
    if _is_finished(folder):
        on_main(lambda: sweep(folder))
        return load_result(folder)
    with contextlib.ExitStack() as stack:
        on_main(lambda: _enter(stack, folder))
        # Another process may have finished it before the lock was ours.
        while not _is_finished(folder):
            try:
                return _train(config, data, folder, callbacks, intervene)
            except NonfiniteError as error:
                on_main(partial(_go_around, config, data, folder, error))
            except RuntimeError as error:
                if is_lost_connection(error):
                    raise RunFailedError(
                        f"another of the {n_processes()} processes of this run is gone; the same command resumes from "
                        "the last checkpoint"
                    ) from error
                raise
        return load_result(folder)


def _is_finished(folder: Path) -> bool:
    return on_main((folder / RESULTS_FILE).exists)


def _enter(stack: contextlib.ExitStack, folder: Path) -> None:
    stack.enter_context(locked(folder))


def _train(
    config: RunConfig,
    data: PackedData,
    folder: Path,
    callbacks: tuple[TrainerCallback, ...],
    intervene: Intervention | None,
) -> RunResult:
    sequence_length = config.data.sequence_length
    set_seed(config.seed)
    model = _model(config, data)
    adapters = Adapters(model, config.lora) if config.lora is not None else None
    objective = config.build_objective(model.config, folder)
    if intervene is not None:
        objective, callback = intervene(model)
        callbacks = (callback, *callbacks)
    if config.recipe.is_sharded:
        check_sharding(config, model.config, objective)
    model.set_attn_implementation(config.recipe.attn_implementation)
    on_main(lambda: claim(folder, config, data))
    if config.recipe.gradient_checkpointing:
        # Renamed in transformers 5.23; both names work over the range we support.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    records, rewinds = RunRecords(folder), load_rewinds(folder)
    tokens_per_step = config.recipe.batch_size * sequence_length
    telemetry = Telemetry(
        records,
        recorded_probes(model, objective, config.recipe.probes),
        every=config.recipe.telemetry_steps,
        tokens_per_step=tokens_per_step,
        logged=logged_terms(objective),
    )
    halts = config.recipe.on_nonfinite != "record"
    watch = NonfiniteWatch(records, scaled=config.recipe.precision == "fp16") if halts else None
    order = TrainingOrder(_batches(config, data), rewinds, config.seed)
    trainer = NormfreeTrainer(
        sharded=config.recipe.is_sharded,
        objective=objective,
        decay_slopes=config.recipe.decay_slopes,
        decay_steps=config.recipe.n_decay_steps(sequence_length),
        adapters=adapters,
        watch=watch,
        order=order,
        model=model,
        args=config.recipe.training_arguments(folder, sequence_length, config.seed),
        train_dataset=data.train,
        eval_dataset=data.eval,
        # With it every checkpoint has its tokenizer. The blocks are whole: there is nothing to pad.
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        # What asks for a checkpoint, or for none, comes before the telemetry, which flushes its tables for one.
        callbacks=[
            order.epochs,
            StopWhenTold(),
            *([watch] if watch is not None else []),
            TelemetryCallback(telemetry),
            RecordRewinds(records, rewinds, tokens_per_step),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        checkpoint = on_main(partial(last_checkpoint, folder))
        if checkpoint is not None:
            trainer.load_objective(checkpoint)
        with float16_on_cpu(trainer):
            with _deterministic(), deferred():
                if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
                    trainer.load_finished(checkpoint)
                else:
                    trainer.train_from(checkpoint)
            if adapters is not None:
                adapters.merge()
            return _measure(trainer, config, data, folder)
    finally:
        telemetry.close()


def _batches(config: RunConfig, data: PackedData) -> Batches:
    return Batches(len(data.train), config.recipe.batch_size)


def _go_around(config: RunConfig, data: PackedData, folder: Path, error: NonfiniteError) -> None:
    """Notes that the run is to go back to its last checkpoint and past the batches that led to ``error``.

    Raises:
        RunFailedError: it may not, or no longer.
    """
    recipe, rewinds, checkpoint = config.recipe, load_rewinds(folder), last_checkpoint(folder)
    if recipe.on_nonfinite == "halt" or len(rewinds) == recipe.max_rewinds:
        raise halted(error, checkpoint, recipe.on_nonfinite, len(rewinds)) from error
    step = step_of(checkpoint) if checkpoint is not None else 0
    rewind = _batches(config, data).rewind(error.step, step)
    save_rewinds(folder, [*rewinds, rewind])
    log.warning("%s; back to step %d, without the %d sequences that led there", error, step, rewind.skipped)


def _model(config: RunConfig, data: PackedData) -> NormfreeForCausalLM:
    if config.start_from is not None:
        return starting_model(config.start_from, data)
    vocab_size: int = data.statistics["vocab_size"]
    return NormfreeForCausalLM(config.build_model_config(vocab_size, data.tokenizer.eos_token_id))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """On CUDA, kernels that add in a fixed order where there are any; on a CPU they all do."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_data(data: PackedData, recipe: Recipe) -> None:
    """Whether the training split holds at least one batch.

    Raises:
        InputError: it does not.
    """
    if len(data.train) < recipe.batch_size:
        raise InputError(
            f"the training split has {len(data.train)} sequences, fewer than one batch of {recipe.batch_size}; "
            "give a larger corpus, or lower recipe.batch_size"
        )


def load_result(folder: Path) -> RunResult:
    """What the finished run in ``folder`` measured.

    Raises:
        InputError: the folder holds no finished run, or one of its files cannot be read.
    """
    if not (folder / RESULTS_FILE).exists():
        raise InputError(f"{folder} holds no finished run ({RESULTS_FILE} is missing); train it first")
    try:
        table = pd.read_csv(folder / RESULTS_FILE, keep_default_na=False, na_values=["nan"])
        row = {str(name): column.tolist()[0] for name, column in table.items()}
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{folder / RESULTS_FILE} cannot be read; delete it and give the run's command again to measure it anew"
        ) from error
    return RunResult(
        folder=folder,
        row=row,
        sequence_losses=read_parquet(folder / SEQUENCE_LOSSES_FILE),
        head_entropy=read_parquet(folder / HEAD_ENTROPY_FILE),
    )


def _measure(trainer: NormfreeTrainer, config: RunConfig, data: PackedData, folder: Path) -> RunResult:
    """Evaluates the trained model on every evaluation sequence and writes what the run leaves."""
    model = trainer.measured_model
    probe = EntropyProbe(model)
    with torch.compiler.set_stance("force_eager"):
        losses = trainer.sequence_losses(data.eval, probe)
    probe.reduce()
    entropy = probe.per_head().cpu().numpy()
    layers, heads = np.indices(entropy.shape)
    head_entropy = pd.DataFrame(
        {"layer": layers.ravel(), "head": heads.ravel(), "entropy_nats": entropy.ravel().astype(np.float64)}
    )
    # Sequences of prompts only have no loss. Any other NaN makes the mean NaN: a model that fails on some text has no
    # perplexity on it.
    n_predicted = data.eval.n_predicted()
    sequence, eval_loss = np.flatnonzero(n_predicted), mean_loss(losses, n_predicted)
    n_tokens = config.recipe.n_tokens(config.data.sequence_length)
    row = {
        "model": config.model_name,
        "context_length": config.data.sequence_length,
        "configuration": config.configuration,
        "seed": config.seed,
        "learning_rate": config.recipe.learning_rate,
        "n_parameters": model.num_parameters(),
        "steps": trainer.args.max_steps,
        "tokens": n_tokens,
        "epochs": n_tokens / (len(data.train) * config.data.sequence_length),
        "eval_sequences": len(sequence),
        "eval_loss": eval_loss,
        "eval_ppl": perplexity(eval_loss),
        "status": "finished" if all_finite(model) and math.isfinite(eval_loss) else "diverged",
    }
    sequence_table = pd.DataFrame({"sequence": sequence, "loss_nats": losses[sequence]})

    def write() -> None:
        write_parquet(sequence_table, folder / SEQUENCE_LOSSES_FILE)
        write_parquet(head_entropy, folder / HEAD_ENTROPY_FILE)
        write_text(folder / RESULTS_FILE, pd.DataFrame([row]).to_csv(index=False, na_rep="nan"))

    on_main(write)
    return load_result(folder)
