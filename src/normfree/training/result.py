"""The results of a finished run: its files, and how they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from normfree.columns import ENTROPY_NATS, EVAL_LOSS, EVAL_PPL, LOSS_NATS
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling import NormfreeForCausalLM
from normfree.probes import EntropyProbe
from normfree.processes import on_main
from normfree.training.evaluation import mean_loss, perplexity, shared_losses
from normfree.training.nonfinite import all_finite
from normfree.training.records import read_parquet, write_parquet
from normfree.training.run_config import RunConfig
from normfree.training.run_folder import RESULTS_FILE

SEQUENCE_LOSSES_FILE = "sequence_losses.parquet"
HEAD_ENTROPY_FILE = "head_entropy.parquet"


@dataclass(frozen=True)
class RunResult:
    """The results of a finished run on the evaluation tokens, read from its folder.

    row: one row of ``results.csv``.
    sequence_losses: sequence, loss_nats (mean over its predicted tokens).
    head_entropy: layer, head, entropy_nats.
    """

    folder: Path
    row: dict[str, Any]
    sequence_losses: pd.DataFrame
    head_entropy: pd.DataFrame


def load_result(folder: Path) -> RunResult:
    """The results of the finished run in ``folder``.

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


def measure(
    model: NormfreeForCausalLM, config: RunConfig, data: PackedData, folder: Path, accelerator: Accelerator
) -> RunResult:
    """Evaluates the trained model on every evaluation sequence and writes the run's results. Collective."""
    probe = EntropyProbe(model)
    with torch.compiler.set_stance("force_eager"):
        losses = shared_losses(model, data.eval, config.recipe, accelerator, probe)
    probe.reduce()
    entropy = probe.per_head().cpu().numpy()
    layers, heads = np.indices(entropy.shape)
    head_entropy = pd.DataFrame(
        {"layer": layers.ravel(), "head": heads.ravel(), ENTROPY_NATS: entropy.ravel().astype(np.float64)}
    )
    # Sequences of prompts only have no loss. Any other NaN makes the mean NaN: a model that fails on some text has no
    # perplexity on it.
    n_predicted = data.eval.n_predicted()
    sequence, eval_loss = np.flatnonzero(n_predicted), mean_loss(losses, n_predicted)
    length = config.data.sequence_length
    n_tokens = config.recipe.n_tokens(length)
    row = {
        "model": config.model_name,
        "context_length": length,
        "configuration": config.configuration,
        "seed": config.seed,
        "learning_rate": config.recipe.learning_rate,
        "n_parameters": model.num_parameters(),
        "steps": config.recipe.n_steps(length),
        "tokens": n_tokens,
        "epochs": n_tokens / (len(data.train) * length),
        "eval_sequences": len(sequence),
        EVAL_LOSS: eval_loss,
        EVAL_PPL: perplexity(eval_loss),
        "status": "finished" if all_finite(model) and math.isfinite(eval_loss) else "diverged",
    }
    sequence_table = pd.DataFrame({"sequence": sequence, LOSS_NATS: losses[sequence]})
    on_main(partial(_write, folder, sequence_table, head_entropy, row))
    return load_result(folder)


def _write(folder: Path, sequence_losses: pd.DataFrame, head_entropy: pd.DataFrame, row: dict[str, Any]) -> None:
    write_parquet(sequence_losses, folder / SEQUENCE_LOSSES_FILE)
    write_parquet(head_entropy, folder / HEAD_ENTROPY_FILE)
    write_text(folder / RESULTS_FILE, pd.DataFrame([row]).to_csv(index=False, na_rep="nan"))
