"""Feed-forward networks, by name: [batch, T, n_embd] to [batch, T, n_embd], each position separately.

A new one is one ``nn.Module`` built from ``(options, layer)`` and one line in ``FEED_FORWARDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from normfree.errors import InputError
from normfree.model_options import one_of, option
from normfree.modeling.activations import LEAKY_ACTIVATIONS, ActivationOptions, build_activation
from normfree.modeling.initialization import ResidualProjection
from normfree.spark.sizes import TOPK_FFNS, SparkOptions
from normfree.spark.sparse_feed_forward import SparkFeedForward
from normfree.spark.topk import TOPKS


@dataclass(kw_only=True)
class FeedForwardOptions(ActivationOptions, SparkOptions):
    """Feed-forward network
    ``ffn``: ``dense | gated | spark | topk``; ``mlp_bias``.
    """

    ffn: str = option("dense", check=one_of(lambda: FEED_FORWARDS))
    mlp_bias: bool = True

    def check_together(self) -> None:
        leaky = sorted(set(self.activations) & set(LEAKY_ACTIVATIONS))
        if self.ffn in TOPK_FFNS and leaky:
            raise InputError(
                f"activation {leaky[0]} means nothing with ffn {self.ffn!r}: it differs from relu below zero only, "
                "where top-k leaves nothing; use relu"
            )


class DenseFeedForward(nn.Module):
    """σ(x W_in) W_out (ReLU's Revival, Eq. 4)."""

    def __init__(self, options: FeedForwardOptions, layer: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(options.n_embd, options.n_inner, bias=options.mlp_bias)
        self.activation = build_activation(options, layer)
        self.down_proj = _down_proj(options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class TopkFeedForward(DenseFeedForward):
    """σ(Top-k(x W_in)) W_out: a dense network that keeps k neurons, chosen by all of x instead of a predictor.

    Top-k is that of :class:`~normfree.spark.sparse_feed_forward.SparkFeedForward`. Only rows of W_out can be skipped.
    """

    def __init__(self, options: FeedForwardOptions, layer: int) -> None:
        super().__init__(options, layer)
        assert options.topk is not None, "filled in for topk"
        self.n_active = options.spark_sizes.ffn_active
        self.soft_threshold = TOPKS[options.topk].soft_threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.soft_threshold(self.up_proj(x), self.n_active)))


class GatedFeedForward(nn.Module):
    """(σ(x W_gate) ⊙ x W_in) W_out (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, options: FeedForwardOptions, layer: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(options.n_embd, options.n_inner, bias=options.mlp_bias)
        self.up_proj = nn.Linear(options.n_embd, options.n_inner, bias=options.mlp_bias)
        self.activation = build_activation(options, layer)
        self.down_proj = _down_proj(options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def _down_proj(options: FeedForwardOptions) -> ResidualProjection:
    return ResidualProjection(options.n_inner, options.n_embd, bias=options.mlp_bias)


FEED_FORWARDS: dict[str, Callable[[FeedForwardOptions, int], nn.Module]] = {
    "dense": DenseFeedForward,
    "gated": GatedFeedForward,
    "spark": lambda options, layer: SparkFeedForward(
        options, bias=options.mlp_bias, activation=build_activation(options, layer), down_proj=_down_proj(options)
    ),
    "topk": TopkFeedForward,
}


def build_feed_forward(options: FeedForwardOptions, layer: int) -> nn.Module:
    """The feed-forward network of block ``layer`` (from 0)."""
    return FEED_FORWARDS[options.ffn](options, layer)
