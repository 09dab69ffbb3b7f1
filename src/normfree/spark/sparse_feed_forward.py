"""The sparse feed-forward network of "Spark Transformer" (2025), Section 2."""

from __future__ import annotations

import torch
from torch import nn

from normfree.spark.sizes import SparkOptions
from normfree.spark.topk import TOPKS


class SparkFeedForward(nn.Module):
    """(σ(Top-k(x[:r] W_predictor)) ⊙ x[r:] W_in) W_out ("Spark Transformer", Spark-FFN, Section 2).

    The first r numbers of x predict which k neurons are worth computing from the others. The three weights,
    [n_inner, r], [n_inner, n_embd − r] and [n_embd, n_inner], have as many entries as the two of a dense network. So
    do the biases: that of the hidden layer is the predictor's, where it takes part in the choice.

    Top-k is a soft threshold, max(· − θ, 0) (:func:`normfree.statistical_topk`), so that σ sees no negative number,
    and ReLU is the identity. In training everything is computed and multiplied by zero; what can be skipped is every
    neuron whose predictor is not above θ.
    """

    def __init__(self, options: SparkOptions, *, bias: bool, activation: nn.Module, down_proj: nn.Linear) -> None:
        super().__init__()
        assert options.topk is not None, "filled in for spark"
        self.predictor_dim = options.spark_sizes.ffn_predictor_dim
        self.n_active = options.spark_sizes.ffn_active
        self.soft_threshold = TOPKS[options.topk].soft_threshold
        self.predictor_proj = nn.Linear(self.predictor_dim, options.n_inner, bias=bias)
        self.up_proj = nn.Linear(options.n_embd - self.predictor_dim, options.n_inner, bias=False)
        self.activation = activation
        self.down_proj = down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        predictor_input, rest = x[..., : self.predictor_dim], x[..., self.predictor_dim :]
        active = self.activation(self.soft_threshold(self.predictor_proj(predictor_input), self.n_active))
        output: torch.Tensor = self.down_proj(active * self.up_proj(rest))
        return output
