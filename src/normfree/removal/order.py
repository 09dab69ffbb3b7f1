"""The order of removals by measurement: the norm first whose constant std costs most alone.

What is hardest to do without goes while the other norms still hold the stream together, and has the longest time to be
learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from normfree.data import PackedSequences
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED
from normfree.progress import track
from normfree.removal.midway import Midway
from normfree.removal.parts import SPECIAL_PARTS, Part
from normfree.removal.schedule import Removal
from normfree.training.evaluation import losses_of, mean_loss
from normfree.training.half_precision import autocast
from normfree.training.recipe import Precision

TOKENS = 2048
"""Training tokens on which each norm is measured, in whole sequences."""


@torch.no_grad()
def norm_costs(
    midway: Midway, removals: Sequence[Removal], data: PackedSequences, precision: Precision
) -> pd.DataFrame:
    """What each norm of ``removals`` costs alone: the increase of the loss when only it divides by its constant std.

    Measured before any norm is constant: the constants are the running stds of that moment, special tokens have their
    own, and the losses are those of ``TOKENS`` tokens of ``data``, evenly spread. The model is left as it was.

    Returns:
        part, layer (None outside of blocks), std, loss_increase (nats); in descending order of the increase, NaN first.
    """
    model = midway.model
    n = min(len(data), max(1, TOKENS // data.sequence_length))
    chosen = [data[int(each)] for each in np.linspace(0, len(data) - 1, n)]
    tokens, labels = (torch.stack([each[name] for each in chosen]) for name in ("input_ids", "labels"))
    n_predicted = (labels[:, 1:] != NOT_PREDICTED).sum(dim=1).numpy()
    norms = [each for each in removals if each.part not in SPECIAL_PARTS]
    was_training = model.training
    model.eval()

    def loss() -> float:
        with autocast(precision, model.device):
            losses = losses_of(model, tokens.to(model.device), labels.to(model.device))
        return mean_loss(losses.double().cpu().numpy(), n_predicted)

    rows, base = [], loss()
    for removal in track(norms, "measuring what each norm costs", unit="norms"):
        with midway.alone(removal) as std:
            rows.append({"part": removal.part, "layer": removal.layer, "std": std, "loss_increase": loss() - base})
    model.train(was_training)
    costs = pd.DataFrame(rows).astype({"layer": "Int64"})
    return costs.sort_values("loss_increase", ascending=False, kind="stable", na_position="first", ignore_index=True)


def measured_order(costs: pd.DataFrame) -> list[tuple[Part, int | None]]:
    """Part and layer of the rows of :func:`norm_costs`, in their order; also of its table read from a file."""
    layers = (None if pd.isna(layer) else int(layer) for layer in costs["layer"])
    return list(zip(costs["part"], layers, strict=True))
