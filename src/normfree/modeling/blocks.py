"""Transformer blocks: where the norms stand, by name of the placement.

A new placement is one subclass of ``Block`` and one line in ``PLACEMENTS``. A block maps the residual stream
[batch, T, n_embd] to the residual stream, so a hook on a block's output reads the residual stream after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from normfree.modeling.attention import build_attention
from normfree.modeling.feedforward import build_feed_forward
from normfree.modeling.norms import build_norm

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig


class Block(GradientCheckpointingLayer):
    """The parts every placement has: attention, feed-forward network, a norm and a dropout for each."""

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, layer, n_reader=2)
        self.attention = build_attention(config, layer)
        self.ffn_norm = build_norm(config, layer)
        self.ffn = build_feed_forward(config, layer)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


class PreNormBlock(Block):
    """h = x + Attention(Norm(x));  y = h + FFN(Norm(h))  (ReLU's Revival, Eq. 1)."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), **kwargs)[0])
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class ParallelPreNormBlock(Block):
    """y = x + Attention(Norm₁(x)) + FFN(Norm₂(x))  (GPT-NeoX and Pythia, Black et al. 2022, Section 2.1)."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.dropout(self.attention(self.attention_norm(x), **kwargs)[0])
        return self.dropout(self.ffn(self.ffn_norm(x))) + attended + x


class PostNormBlock(Block):
    """h = Norm(x + Attention(x));  y = Norm(h + FFN(h))  (Vaswani et al. 2017)."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, **kwargs)[0]))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


PLACEMENTS: dict[str, type[Block]] = {"pre": PreNormBlock, "post": PostNormBlock}


def build_block(config: NormfreeConfig, layer: int) -> Block:
    """Block ``layer`` (from 0)."""
    block = ParallelPreNormBlock if config.parallel_residual else PLACEMENTS[config.norm_placement]
    return block(config, layer)
