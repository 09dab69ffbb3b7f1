"""The sparse feed-forward network of "Spark Transformer" (2025), Section 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from normfree.modeling.activations import build_activation
from normfree.modeling.residual import ResidualProjection
from normfree.spark import TOPKS

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig


class SparkFeedForward(nn.Module):
    """(σ(Top-k(x[:r] W_predictor)) ⊙ x[r:] W_in) W_out ("Spark Transformer", Spark-FFN, Section 2).

    The first r numbers of x predict which k neurons are worth computing from the others. The three weights,
    [n_inner, r], [n_inner, n_embd − r] and [n_embd, n_inner], have as many entries as the two of a dense network. So
    do the biases: that of the hidden layer is the predictor's, where it takes part in the choice.

    Top-k is a soft threshold, max(· − θ, 0) (:func:`normfree.statistical_topk`), so that σ sees no negative number,
    and ReLU is the identity. In training everything is computed and multiplied by zero; what can be skipped is every
    neuron whose predictor is not above θ.
    """

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__()
        sizes = config.spark_sizes
        self.predictor_dim = sizes.ffn_predictor_dim
        self.n_active = sizes.ffn_active
        assert config.topk is not None, "the configuration sets it for spark"
        self.soft_threshold = TOPKS[config.topk].soft_threshold
        self.predictor_proj = nn.Linear(self.predictor_dim, config.n_inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd - self.predictor_dim, config.n_inner, bias=False)
        self.activation = build_activation(config, layer)
        self.down_proj = ResidualProjection(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        predictor_input, rest = x[..., : self.predictor_dim], x[..., self.predictor_dim :]
        active = self.activation(self.soft_threshold(self.predictor_proj(predictor_input), self.n_active))
        return self.down_proj(active * self.up_proj(rest))
