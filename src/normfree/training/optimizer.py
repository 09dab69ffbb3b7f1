"""AdamW with weight decay on weights only, and the learning rate of each step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from normfree.training.recipe import Recipe

NOT_DECAYED = re.compile(r"bias|(^|[._])norm(\.|$)")
"""Names of parameters without weight decay: biases, and all that belongs to a norm."""
SLOPE = ".negative_slope"


def adamw(model: nn.Module, recipe: Recipe, learned: Iterable[nn.Parameter] = ()) -> torch.optim.AdamW:
    """The optimizer of the parameters of ``model`` that need a gradient, and of what an objective ``learned``.

    Weight decay acts on weights and, with ``recipe.decay_slopes``, on learnable slopes.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = NOT_DECAYED.search(name) or (name.endswith(SLOPE) and not recipe.decay_slopes)
            (others if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    learned = list(learned)
    if learned:
        groups.append({"params": learned, "weight_decay": 0.0})
    betas = recipe.adam_beta1, recipe.adam_beta2
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True)


def learning_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, sequence_length: int) -> LambdaLR:
    """A linear rise from 0 over the warm-up, then the recipe's decay; see :class:`Recipe`."""
    warmup, end = recipe.n_warmup_steps(sequence_length), recipe.n_decay_steps(sequence_length)
    lowest = recipe.final_learning_rate_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if recipe.learning_rate_decay == "linear":
            return max(0.0, (end - step) / max(1, end - warmup))
        progress = (step - warmup) / max(1, end - warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)) * (1 - lowest) + lowest)

    return LambdaLR(optimizer, factor)
