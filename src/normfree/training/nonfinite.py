"""NaN and infinite losses and gradients, which a run records, stops at, or skips after a rewind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from normfree.errors import RunFailedError
from normfree.processes import largest
from normfree.training.distributed import own_part
from normfree.training.recipe import OnNonfinite

REWINDS = "rewinds"
"""The metric: how often the run had been rewound when it last took this step."""


class NonfiniteError(Exception):
    """The loss, gradient or model of optimizer step ``step`` (from 1) is not finite; no checkpoint holds it."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: the {what} is not finite")
        self.step = step


def nonfinite(loss: Tensor, parameters: Iterable[nn.Parameter], *, scaled: bool) -> str | None:
    """Names what is not finite in any process: "loss", "gradient" or None. Collective; waits for the device.

    A gradient that overflows under a ``scaled`` loss (fp16) belongs to the search for a loss scale, which skips it.
    """
    is_bad = [~loss.isfinite()]
    gradients = [] if scaled else [own_part(each.grad) for each in parameters if each.grad is not None]
    if gradients:
        is_bad.append(~torch.stack([each.isfinite().all() for each in gradients]).all())
    in_loss, *in_gradient = torch.stack(is_bad).tolist()
    return (None, "gradient", "loss")[largest(2 if in_loss else int(any(in_gradient)))]


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """True if no parameter of ``model`` holds NaN or Inf, in any process. Collective."""
    is_finite = all(bool(own_part(parameter).isfinite().all()) for parameter in model.parameters())
    return largest(int(not is_finite)) == 0


def halted(error: NonfiniteError, checkpoint: Path | None, policy: OnNonfinite, n_rewinds: int) -> RunFailedError:
    """The error that ends a run that may not continue."""
    kept = f"{checkpoint.name} is the last good checkpoint" if checkpoint is not None else "there is no checkpoint yet"
    if policy == "halt":
        return RunFailedError(f"{error}; stopped, as recipe.on_nonfinite asks for; {kept}")
    return RunFailedError(
        f"{error}, after {n_rewinds} rewinds already (recipe.max_rewinds); {kept}; lower recipe.learning_rate"
    )
