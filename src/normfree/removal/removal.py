"""A removal of norms from end to end: measure, fine-tune, fold, export, and measure again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from pathlib import Path

import pandas as pd
import yaml
from transformers import PreTrainedModel

from normfree.columns import EVAL_LOSS, EVAL_PPL
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.files import folder_written_whole, write_text
from normfree.modeling import NormfreeForCausalLM
from normfree.removal.finetuning import (
    RemovalDivergedError,
    check_fit,
    constant_std_model,
    remove_by_finetuning,
)
from normfree.removal.fold import remove_norms
from normfree.removal.layout import (
    NORM_FREE,
    NORM_FREE_FOLDER,
    ORIGINAL,
    REMOVAL_FOLDER,
    SCHEDULE_FILE,
    STOCK_FOLDER,
    TABLE_FILE,
    VANILLA,
)
from normfree.removal.model_card import write_cards
from normfree.removal.parts import check_removable, parts_to_remove
from normfree.removal.schedule import RemovalSchedule, automatic_schedule, load_schedule
from normfree.removal.stock import check_predictions, to_stock
from normfree.training import Callback, RunConfig, load_pretrained, train
from normfree.training.evaluation import loss_on, perplexity
from normfree.training.loop import check_data
from normfree.training.pretrained import starting_model

log = logging.getLogger(__name__)

CHECKED_SEQUENCES = 4
"""On which a stock export has to predict as the model does."""
Callbacks = Callable[[str, int], tuple[Callback, ...]]
"""Callbacks of a run, from its name and its tokens."""


@dataclass(frozen=True)
class RemovalResult:
    """The result of :func:`remove`.

    table: variant, finetuning_tokens, eval_loss (nats), eval_ppl, delta_loss (to the original); a row a variant.
    norm_free: folder of the model without norms, in transformers' format, with a model card.
    stock: folder of the same model as a stock model of transformers; None if no architecture can hold it.
    """

    table: pd.DataFrame
    norm_free: Path
    stock: Path | None


def remove(
    run: RunConfig,
    data: PackedData,
    folder: Path,
    schedule: RemovalSchedule | None,
    *,
    vanilla: bool = True,
    callbacks: Callbacks = lambda name, tokens: (),
) -> RemovalResult:
    """Removes the norms of the model that ``run`` starts from, and compares the result with it.

    ``folder`` then holds the runs ``vanilla`` (the same tokens with norms kept) and ``removal``, the initial schedule
    in ``schedule.yaml``, the model without norms in ``norm-free`` and, if a stock architecture can hold it, in
    ``stock``; and ``removal.csv``. Every variant is measured
    on all evaluation sequences in float32. Finished parts are not repeated. A removal that diverged too often leaves a
    ``removal.csv`` with a loss of NaN without norms.

    Args:
        run: its ``start_from`` is the model; its ``configuration`` is replaced.
        schedule: None for :func:`~normfree.removal.schedule.automatic_schedule`.
        vanilla: whether to train the control.

    Raises:
        RemovalDivergedError: the removal diverged too often.
        InputError: the model has no norms to remove, the schedule does not fit, or ``folder`` holds a removal by
            another schedule. Nothing is written.
    """
    assert run.start_from is not None, "there is a model to start from"
    if run.lora is not None:
        run.lora.check()
    run.recipe.check(run.data.sequence_length)
    check_data(data, run.recipe)
    original = starting_model(run.start_from, data)
    config = original.config
    check_removable(config, "keep" if schedule is None else schedule.qk_norms)
    T = run.data.sequence_length
    schedule = schedule or automatic_schedule(config.n_layer, run.recipe.n_steps(T), parts_to_remove(config, "keep"))
    check_fit(run, schedule, config)
    _claim(folder, schedule)
    tokens = run.recipe.n_tokens(T)
    losses = {ORIGINAL: loss_on(original, data.eval)}
    del original  # each run loads it again
    if vanilla:
        control = run.model_copy(update={"configuration": VANILLA})
        train(control, data, folder / VANILLA, callbacks=callbacks(VANILLA, tokens))
        losses[VANILLA] = loss_on(load_pretrained(str(folder / VANILLA)).as_normfree(), data.eval)
    removing = run.model_copy(update={"configuration": NORM_FREE})
    place, following = folder / REMOVAL_FOLDER, callbacks(NORM_FREE, tokens)
    try:
        remove_by_finetuning(removing, data, place, schedule, config, callbacks=following)
    except RemovalDivergedError:
        _write_table(losses | {NORM_FREE: nan}, tokens, folder)
        raise
    losses[NORM_FREE], stock = _export_both(data, folder)
    table = _write_table(losses, tokens, folder)
    write_cards(folder)
    return RemovalResult(table, folder / NORM_FREE_FOLDER, stock)


def _claim(folder: Path, schedule: RemovalSchedule) -> None:
    """Claims ``folder`` for a removal by ``schedule``.

    Raises:
        InputError: it holds a removal by another one.
    """
    path = folder / SCHEDULE_FILE
    if not path.exists():
        write_text(path, yaml.safe_dump(schedule.model_dump(mode="json", exclude_none=True), sort_keys=False))
    elif load_schedule(str(path)) != schedule:
        raise InputError(
            f"{folder} holds a removal by another schedule ({SCHEDULE_FILE}); give another folder with --out, or its "
            "schedule with --schedule"
        )


def _write_table(losses: dict[str, float], tokens: int, folder: Path) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "variant": variant,
            "finetuning_tokens": 0 if variant == ORIGINAL else tokens,
            EVAL_LOSS: loss,
            EVAL_PPL: perplexity(loss),
            "delta_loss": loss - losses[ORIGINAL],
        }
        for variant, loss in losses.items()
    )
    write_text(folder / TABLE_FILE, table.to_csv(index=False, na_rep="nan"))
    return table


def _export_both(data: PackedData, folder: Path) -> tuple[float, Path | None]:
    """Writes the exports; the loss without norms, and the folder of the stock model if an architecture can hold it."""
    constant = constant_std_model(folder / REMOVAL_FOLDER)
    norm_free = remove_norms(constant)
    _export(norm_free, data, folder / NORM_FREE_FOLDER)
    return loss_on(norm_free, data.eval), _export_stock(constant, data, folder / STOCK_FOLDER)


def _export_stock(model: NormfreeForCausalLM, data: PackedData, folder: Path) -> Path | None:
    try:
        exported = to_stock(model)
        check_predictions(exported, model, data.eval.whole(CHECKED_SEQUENCES)[0])
    except InputError as reason:
        log.warning("no stock model is exported: %s", reason)
        return None
    _export(exported, data, folder)
    return folder


def _export(model: PreTrainedModel, data: PackedData, folder: Path) -> None:
    with folder_written_whole(folder) as temporary:
        model.save_pretrained(temporary)
        data.tokenizer.save_pretrained(temporary)
