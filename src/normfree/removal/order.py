"""The order of removals by measurement: the norm first whose constant std costs least alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from normfree.data import PackedSequences
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED
from normfree.progress import track
from normfree.removal.midway import Midway
from normfree.removal.parts import SPECIAL_PARTS
from normfree.removal.schedule import RemovalSchedule
from normfree.training.evaluation import losses_of, mean_loss
from normfree.training.half_precision import autocast
from normfree.training.recipe import Recipe

TOKENS = 2048
"""Training tokens on which each norm is measured, in whole sequences."""


def norm_costs(
    model: NormfreeForCausalLM, data: PackedSequences, schedule: RemovalSchedule, recipe: Recipe
) -> pd.DataFrame:
    """What each norm of ``model`` costs alone: the increase of the loss when only it divides by its constant std.

    The constants are the schedule's statistic over ``TOKENS`` tokens of ``data``, with its special tokens apart; the
    losses are of the same tokens, in the precision of ``recipe``. ``model`` is left with removable norms.

    Returns:
        part, layer (None outside of blocks), std, loss_increase (nats); in ascending order of the increase, NaN last.
    """
    n = min(len(data), max(1, TOKENS // data.sequence_length))
    chosen = [data[int(each)] for each in np.linspace(0, len(data) - 1, n)]
    tokens, labels = (torch.stack([each[name] for each in chosen]) for name in ("input_ids", "labels"))
    n_predicted = (labels[:, 1:] != NOT_PREDICTED).sum(dim=1).numpy()
    removals = [each for each in schedule.removals(model.config) if each.part not in SPECIAL_PARTS]
    midway = Midway(model.eval(), schedule)

    def loss() -> float:
        with autocast(recipe.precision, model.device):
            losses = losses_of(model, tokens.to(model.device), labels.to(model.device))
        return mean_loss(losses.double().cpu().numpy(), n_predicted)

    with midway.measuring():
        base = loss()
    rows = []
    for removal in track(removals, "measuring what each norm costs", unit="norms"):
        with midway.alone(removal) as std:
            rows.append({"part": removal.part, "layer": removal.layer, "std": std, "loss_increase": loss() - base})
    costs = pd.DataFrame(rows).astype({"layer": "Int64"})
    return costs.sort_values("loss_increase", kind="stable", na_position="last", ignore_index=True)
