"""Feed-forward activations, by name.

A new activation is one ``nn.Module`` (or one function wrapped in ``nn.Module``) and one line in ``ACTIVATIONS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig

LEAKY_ACTIVATIONS = ("leaky_relu", "learnable_leaky_relu")
"""Activations that have a negative slope."""


class SquaredReLU(nn.Module):
    """max(x, 0)² (So et al., "Primer", 2021)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()


class LearnableLeakyReLU(nn.Module):
    """x for x > 0, ``negative_slope`` · x otherwise, with a trained slope (ReLU's Revival, Section 3, Figure 3).

    ``negative_slope`` is a float32 parameter of shape [1], not [ ]: sharded data parallelism takes no scalars.
    With ``slope_sharing="global"`` the decoder ties the parameters of all layers into one object.
    """

    def __init__(self, initial_slope: float) -> None:
        super().__init__()
        self.initial_slope = initial_slope
        self.negative_slope = nn.Parameter(torch.full((1,), initial_slope))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, self.negative_slope.to(x.dtype) * x)


def _negative_slope(config: NormfreeConfig) -> float:
    assert config.negative_slope is not None, "the configuration sets it for every leaky activation"
    return config.negative_slope


ACTIVATIONS: dict[str, Callable[[NormfreeConfig], nn.Module]] = {
    "gelu": lambda config: nn.GELU(),
    "gelu_tanh": lambda config: nn.GELU(approximate="tanh"),
    "relu": lambda config: nn.ReLU(),
    "leaky_relu": lambda config: nn.LeakyReLU(_negative_slope(config)),
    "learnable_leaky_relu": lambda config: LearnableLeakyReLU(_negative_slope(config)),
    "silu": lambda config: nn.SiLU(),
    "relu_squared": lambda config: SquaredReLU(),
}


def build_activation(config: NormfreeConfig, layer: int) -> nn.Module:
    """The activation of the feed-forward network in ``layer`` (from 0)."""
    return ACTIVATIONS[config.activations[layer]](config)
