"""A removal of norms from end to end: measured, fine-tuned, folded, exported, and measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling import NormfreeForCausalLM
from normfree.removal.finetuning import check_fit, constant_std_model, remove_by_finetuning
from normfree.removal.fold import remove_norms
from normfree.removal.gpt2 import to_gpt2
from normfree.removal.midway import check_removable
from normfree.removal.schedule import RemovalSchedule, automatic_schedule
from normfree.training import RunConfig, load_pretrained, train
from normfree.training.evaluation import evaluation_losses, perplexity
from normfree.training.pretrained import starting_model

TABLE_FILE = "removal.csv"
NORM_FREE_FOLDER = "norm-free"
GPT2_FOLDER = "gpt2"
ORIGINAL, VANILLA, NORM_FREE = "original", "vanilla", "norm-free"

Callbacks = Callable[[str, int], tuple[TrainerCallback, ...]]
"""What follows a run's progress, from its name and its tokens."""


@dataclass(frozen=True)
class RemovalResult:
    """What :func:`remove` found, and where the models are.

    table: variant, finetuning_tokens, eval_loss (nats), eval_ppl, delta_loss (to the original); one row a variant.
    norm_free: the folder of the model without norms, in transformers' form.
    gpt2: that of the same model as a stock GPT-2, where it can be one.
    """

    table: pd.DataFrame
    norm_free: Path
    gpt2: Path | None


def remove(
    run: RunConfig,
    data: PackedData,
    folder: Path,
    schedule: RemovalSchedule | None,
    *,
    vanilla: bool = True,
    callbacks: Callbacks = lambda name, tokens: (),
) -> RemovalResult:
    """Takes the norms out of the model that ``run`` starts from, and compares what is left with it.

    ``folder`` then holds the runs ``vanilla`` (the same tokens with the norms kept) and ``removal``, the model without
    norms in ``norm-free`` and, where GPT-2's architecture can hold it, ``gpt2``; and ``removal.csv``. Every variant is
    measured on all evaluation sequences in float32. What is finished is not done again.

    Args:
        run: its ``start_from`` is the model; its ``configuration`` is replaced.
        schedule: None for :func:`~normfree.removal.schedule.automatic_schedule`.
        vanilla: whether to train the control.

    Raises:
        InputError: the model has no norms to remove, the schedule does not fit, or the removal diverged for good; in
            the first two cases nothing is written.
    """
    assert run.start_from is not None, "there is a model to start from"
    original = starting_model(run.start_from, data)
    config = original.config
    check_removable(config)
    T = run.data.sequence_length
    schedule = automatic_schedule(config.n_layer, run.recipe.n_steps(T)) if schedule is None else schedule
    check_fit(run, schedule, config)
    tokens = run.recipe.n_tokens(T)

    sequences = torch.from_numpy(np.asarray(data.eval.tokens, dtype=np.int64))
    losses = {ORIGINAL: _loss(original, sequences)}
    del original  # each run loads it again, and trains beside whatever is still held
    if vanilla:
        control = run.model_copy(update={"configuration": VANILLA})
        train(control, data, folder / VANILLA, callbacks=callbacks(VANILLA, tokens))
        losses[VANILLA] = _loss(load_pretrained(str(folder / VANILLA)).as_normfree(), sequences)
    removing = run.model_copy(update={"configuration": NORM_FREE})
    remove_by_finetuning(removing, data, folder / "removal", schedule, config, callbacks=callbacks(NORM_FREE, tokens))
    constant = constant_std_model(folder / "removal")
    norm_free = remove_norms(constant)
    losses[NORM_FREE] = _loss(norm_free, sequences)
    norm_free.save_pretrained(folder / NORM_FREE_FOLDER)
    data.tokenizer.save_pretrained(folder / NORM_FREE_FOLDER)
    result = RemovalResult(_table(losses, tokens), folder / NORM_FREE_FOLDER, _export_gpt2(constant, data, folder))
    write_text(folder / TABLE_FILE, result.table.to_csv(index=False, na_rep="nan"))
    return result


def _loss(model: NormfreeForCausalLM, sequences: torch.Tensor) -> float:
    return float(evaluation_losses(model.eval(), sequences).mean())


def _table(losses: dict[str, float], tokens: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": variant,
            "finetuning_tokens": 0 if variant == ORIGINAL else tokens,
            "eval_loss": loss,
            "eval_ppl": perplexity(loss),
            "delta_loss": loss - losses[ORIGINAL],
        }
        for variant, loss in losses.items()
    )


def _export_gpt2(model: NormfreeForCausalLM, data: PackedData, folder: Path) -> Path | None:
    try:
        exported = to_gpt2(model)
    except InputError:
        return None
    exported.save_pretrained(folder / GPT2_FOLDER)
    data.tokenizer.save_pretrained(folder / GPT2_FOLDER)
    return folder / GPT2_FOLDER
