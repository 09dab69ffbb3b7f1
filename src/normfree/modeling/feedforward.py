"""Feed-forward networks, by name: [batch, T, n_embd] to [batch, T, n_embd], each position alone.

A new one is one ``nn.Module`` built from ``(config, layer)`` and one line in ``FEED_FORWARDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from normfree.modeling.activations import build_activation
from normfree.modeling.residual import ResidualProjection
from normfree.spark.sparse_feedforward import SparkFeedForward

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig


class DenseFeedForward(nn.Module):
    """σ(x W_in) W_out (ReLU's Revival, Eq. 4)."""

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.activation = build_activation(config, layer)
        self.down_proj = ResidualProjection(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedFeedForward(nn.Module):
    """(σ(x W_gate) ⊙ x W_in) W_out (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.activation = build_activation(config, layer)
        self.down_proj = ResidualProjection(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


FEED_FORWARDS: dict[str, Callable[[NormfreeConfig, int], nn.Module]] = {
    "dense": DenseFeedForward,
    "gated": GatedFeedForward,
    "spark": SparkFeedForward,
}


def build_feed_forward(config: NormfreeConfig, layer: int) -> nn.Module:
    """The feed-forward network of block ``layer`` (from 0)."""
    return FEED_FORWARDS[config.ffn](config, layer)
