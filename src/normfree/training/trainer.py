"""One training run: from a configuration and packed tokens to a run folder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from transformers import PrinterCallback, Trainer, TrainerCallback, default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from normfree.data import PackedData
from normfree.entropy import EntropyProbe
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling import NormfreeForCausalLM
from normfree.training.configuration import (
    CONFIG_FILE,
    RunConfig,
    load_run_config,
    provenance,
)
from normfree.training.evaluation import perplexity, sequence_losses
from normfree.training.half_precision import float16_on_cpu
from normfree.training.objectives import Objective
from normfree.training.objectives.trainer import ObjectiveTrainer
from normfree.training.pretrained import starting_model
from normfree.training.recipe import Recipe
from normfree.training.records import RunRecords, write_parquet
from normfree.training.run_folder import RESULTS_FILE, last_checkpoint
from normfree.training.telemetry import Telemetry, all_finite

SEQUENCE_LOSSES_FILE = "sequence_losses.parquet"
HEAD_ENTROPY_FILE = "head_entropy.parquet"


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured on the evaluation tokens, as read back from its folder.

    row: one row of ``results.csv``.
    sequence_losses: sequence, loss_nats (mean over the T - 1 predicted tokens).
    head_entropy: layer, head, entropy_nats.
    """

    folder: Path
    row: dict[str, Any]
    sequence_losses: pd.DataFrame
    head_entropy: pd.DataFrame


class NormfreeTrainer(ObjectiveTrainer):
    """The Trainer with an objective, and with a say in whether weight decay pulls learnable slopes towards zero.

    Its logged loss is finite again after a step whose loss was not.
    """

    def __init__(self, *, decay_slopes: bool, **options: Any) -> None:
        self.decay_slopes = decay_slopes
        super().__init__(**options)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if self.decay_slopes or not name.endswith(".negative_slope")]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            # The Trainer takes the sum it has logged away from itself, and NaN - NaN is NaN in every later step.
            self._tr_loss.zero_()


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
    finished. A run whose weights stop being finite goes on to its end, with its last good checkpoint kept, and has
    the status ``diverged``.

    Raises:
        InputError: the folder holds a run of another configuration, the data are too few for one batch, or the
            objective cannot be followed.
    """
    if config.objective is not None and intervene is not None:
        raise InputError(f"the objective {config.objective.kind} cannot be combined with another intervention")
    config.recipe.check(config.data.sequence_length)
    check_data(data, config.recipe)
    # transformers' own bars (one for each checkpoint) would break up ours.
    disable_progress_bar()
    is_finished = (folder / RESULTS_FILE).exists()
    if is_finished:
        _claim(folder, config, data)
        return load_result(folder)

    sequence_length = config.data.sequence_length
    set_seed(config.seed)
    model = _model(config, data)
    objective = config.build_objective(model.config, folder)
    if intervene is not None:
        objective, callback = intervene(model)
        callbacks = (callback, *callbacks)
    _claim(folder, config, data)
    model.set_attn_implementation(config.recipe.attn_implementation)
    if config.recipe.gradient_checkpointing:
        # Renamed in transformers 5.23; both names work over the range we support.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    telemetry = Telemetry(
        RunRecords(folder),
        telemetry_steps=config.recipe.telemetry_steps,
        tokens_per_step=config.recipe.batch_size * sequence_length,
        objective=objective,
    )
    trainer = NormfreeTrainer(
        objective=objective,
        decay_slopes=config.recipe.decay_slopes,
        model=model,
        args=config.recipe.training_arguments(folder, sequence_length, config.seed),
        train_dataset=data.train,
        eval_dataset=data.eval,
        # With it every checkpoint has its tokenizer. The blocks are whole: there is nothing to pad.
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        callbacks=[telemetry, *callbacks],
        preprocess_logits_for_metrics=sequence_losses,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            trainer.load_objective(checkpoint)
        with float16_on_cpu(trainer):
            with _deterministic():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return _measure(trainer, config, data, folder)
    finally:
        telemetry.detach()


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
        InputError: the folder holds no finished run.
    """
    if not (folder / RESULTS_FILE).exists():
        raise InputError(f"{folder} holds no finished run ({RESULTS_FILE} is missing); train it first")
    table = pd.read_csv(folder / RESULTS_FILE, keep_default_na=False, na_values=["nan"])
    return RunResult(
        folder=folder,
        row={str(name): column.tolist()[0] for name, column in table.items()},
        sequence_losses=pd.read_parquet(folder / SEQUENCE_LOSSES_FILE),
        head_entropy=pd.read_parquet(folder / HEAD_ENTROPY_FILE),
    )


def _claim(folder: Path, config: RunConfig, data: PackedData) -> None:
    """Makes ``folder`` the folder of this run, or checks that it already is.

    Raises:
        InputError: it holds a run of another configuration or other data, or something that is no run.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        differences = _differences(load_run_config(path).model_dump(mode="json"), config.model_dump(mode="json"))
        fingerprint = yaml.safe_load(path.read_text(encoding="utf-8"))["provenance"]["corpus_fingerprint"]
        if fingerprint != data.fingerprint:
            differences.append(f"corpus fingerprint: {fingerprint} there, {data.fingerprint} asked for")
        if differences:
            raise InputError(
                f"{folder} holds a run of another configuration ({'; '.join(differences)}); "
                "give another output folder, or the same options"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run ({CONFIG_FILE} is missing); give another folder")
    write_text(path, config.to_yaml(provenance(data)))


def _differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(there.keys() | asked.keys()):
        old, new = there.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.extend(_differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name}: {old!r} there, {new!r} asked for")
    return found


def _measure(trainer: Trainer, config: RunConfig, data: PackedData, folder: Path) -> RunResult:
    """Evaluates the trained model on every evaluation sequence and writes what the run leaves."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.compiler.set_stance("force_eager"), EntropyProbe(model) as probe:
        losses = np.asarray(trainer.predict(data.eval).predictions, dtype=np.float64)
    probe.reduce()
    entropy = probe.per_head().cpu().numpy()
    layers, heads = np.indices(entropy.shape)
    head_entropy = pd.DataFrame(
        {"layer": layers.ravel(), "head": heads.ravel(), "entropy_nats": entropy.ravel().astype(np.float64)}
    )
    # A NaN sequence makes the mean NaN: a model that fails on some text has no perplexity on it.
    eval_loss = float(losses.mean())
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
        "eval_sequences": len(losses),
        "eval_loss": eval_loss,
        "eval_ppl": perplexity(eval_loss),
        "status": "finished" if all_finite(model) and math.isfinite(eval_loss) else "diverged",
    }
    if trainer.is_world_process_zero():
        write_parquet(
            pd.DataFrame({"sequence": np.arange(len(losses)), "loss_nats": losses}),
            folder / SEQUENCE_LOSSES_FILE,
        )
        write_parquet(head_entropy, folder / HEAD_ENTROPY_FILE)
        write_text(folder / RESULTS_FILE, pd.DataFrame([row]).to_csv(index=False, na_rep="nan"))
    trainer.accelerator.wait_for_everyone()
    return load_result(folder)
