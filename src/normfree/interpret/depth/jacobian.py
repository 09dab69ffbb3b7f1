"""Distance of each block's Jacobian from the identity, estimated without building the Jacobian."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from normfree.columns import STANDARD_ERROR
from normfree.interpret.depth.averages import mean_and_standard_error
from normfree.interpret.depth.block_calls import BlockCall, RecordedPass


def squared_jacobian_distances(recorded: RecordedPass, n_probe: int, generator: torch.Generator) -> torch.Tensor:
    """‖Jᵀv − v‖² / (T d) of every block, probe and sequence: float64 [n_layer, n_probe, batch].

    J [T d, T d] is the Jacobian of a block's output in its input, over all tokens and channels of a sequence, at the
    input of the recorded pass. The entries of a probe v are ±1 (Rademacher), so the expectation is ‖J − I‖_F² / (T d)
    (Hutchinson, 1990). Reverse mode works with every attention that can be trained.
    """
    return torch.stack([_of_block(call, n_probe, generator) for call in recorded.calls])


def jacobian_frame(squared: torch.Tensor) -> pd.DataFrame:
    """The frame ``jacobian_distance`` of a measurement, from :func:`squared_jacobian_distances` of all sequences.

    Returns:
        layer, jacobian_distance (sqrt of the mean of ‖J − I‖_F² / (T d) over sequences: 0 for the identity, 1 for a
        constant block), standard_error (over probes, each the mean over sequences; delta method).
    """
    mean, error = mean_and_standard_error(squared.mean(dim=-1))
    distance = np.sqrt(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_distance = np.where(distance > 0, error / (2 * distance), error)
    return pd.DataFrame({"layer": range(len(mean)), "jacobian_distance": distance, STANDARD_ERROR: of_distance})


def _of_block(call: BlockCall, n_probe: int, generator: torch.Generator) -> torch.Tensor:
    x = call.stream.detach().requires_grad_()
    with torch.enable_grad():
        y = call.run(x)
    squares = []
    for probe in range(n_probe):
        v = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)
        (pulled,) = torch.autograd.grad(y, x, v, retain_graph=probe < n_probe - 1)
        squares.append((pulled.double() - v.double()).square().sum(dim=(1, 2)).cpu() / x[0].numel())
    return torch.stack(squares)
