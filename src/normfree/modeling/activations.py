"""Feed-forward activations, by name.

A new activation is one ``nn.Module`` and one line in ``ACTIVATIONS``; an option of its own is one line in
``ActivationOptions``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from normfree.errors import InputError
from normfree.model_options import Dimensions, finite, one_of, option, option_of

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
        self.negative_slope = nn.Parameter(torch.full((1,), float(initial_slope)))

    def set_initial_values(self) -> None:
        init.constant_(self.negative_slope, self.initial_slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.prelu(x, self.negative_slope.to(x.dtype))


@dataclass(kw_only=True)
class ActivationOptions(Dimensions):
    """Activation
    ``activation``: a name, or a list of ``n_layer`` names; ``negative_slope``: fixed (``leaky_relu``) or initial
    (``learnable_leaky_relu``) slope, default 0.01, and ``slope_sharing``: one learnable slope per ``layer`` or one
    ``global`` parameter.
    """

    activation: str | list[str] = option("gelu", check=one_of(lambda: ACTIVATIONS))
    negative_slope: float | int | None = option_of("activation", kinds=LEAKY_ACTIVATIONS, check=finite, fill=0.01)
    slope_sharing: str | None = option_of(
        "activation", kinds=("learnable_leaky_relu",), check=one_of(("layer", "global")), fill="layer"
    )

    @property
    def activations(self) -> list[str]:
        """The activation of each layer: ``n_layer`` names."""
        return [self.activation] * self.n_layer if isinstance(self.activation, str) else list(self.activation)

    def check_together(self) -> None:
        if len(self.activations) != self.n_layer:
            raise InputError(
                f"activation lists {len(self.activations)} names for n_layer = {self.n_layer}; "
                "give one name, or one name per layer"
            )


def _negative_slope(options: ActivationOptions) -> float:
    assert options.negative_slope is not None, "filled in for every leaky activation"
    return options.negative_slope


ACTIVATIONS: dict[str, Callable[[ActivationOptions], nn.Module]] = {
    "gelu": lambda options: nn.GELU(),
    "gelu_tanh": lambda options: nn.GELU(approximate="tanh"),
    "relu": lambda options: nn.ReLU(),
    "leaky_relu": lambda options: nn.LeakyReLU(_negative_slope(options)),
    "learnable_leaky_relu": lambda options: LearnableLeakyReLU(_negative_slope(options)),
    "silu": lambda options: nn.SiLU(),
    "relu_squared": lambda options: SquaredReLU(),
}


def build_activation(options: ActivationOptions, layer: int) -> nn.Module:
    """The activation of the feed-forward network in ``layer`` (from 0)."""
    return ACTIVATIONS[options.activations[layer]](options)
