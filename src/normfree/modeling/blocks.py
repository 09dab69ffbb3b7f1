"""Transformer blocks: where the norms stand, by name of the placement.

A new placement is one subclass of ``Block`` and one line in ``PLACEMENTS``. A block maps the residual stream
[batch, T, n_embd] to the residual stream, so a hook on a block's output reads the residual stream after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from normfree.modeling.attention import build_attention
from normfree.modeling.feedforward import build_feed_forward
from normfree.modeling.norms import build_norm
from normfree.modeling.residual import INITIAL_SCALE

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig


class Block(GradientCheckpointingLayer):
    """The parts every placement has: attention, feed-forward network, a norm and a dropout for each."""

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__()
        self.layer_type = config.layer_types[layer]
        self.attention_norm = build_norm(config, layer, "attention")
        self.attention = build_attention(config, layer)
        self.ffn_norm = build_norm(config, layer, "ffn")
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


class SandwichNormBlock(Block):
    """h = x + Norm(Attention(Norm(x)));  y = h + Norm(FFN(Norm(h)))  (CogView, Ding et al. 2021, Section 2.4; Gemma 2).

    All four norms have gains of their own.
    """

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_output_norm = build_norm(config, layer, "attention")
        self.ffn_output_norm = build_norm(config, layer, "ffn")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.dropout(self.attention_output_norm(self.attention(self.attention_norm(x), **kwargs)[0]))
        return x + self.dropout(self.ffn_output_norm(self.ffn(self.ffn_norm(x))))


class ReorderedNormBlock(Block):
    """h = x + Norm(Attention(x));  y = h + Norm(FFN(h))  (OLMo 2, 2025, Eq. 1 and 2: reordered norm).

    Swin Transformer V2 (Liu et al. 2022) calls it res-post-norm. No norm acts on the residual stream, and none on what
    the sublayers read.
    """

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.dropout(self.attention_norm(self.attention(x, **kwargs)[0]))
        return x + self.dropout(self.ffn_norm(self.ffn(x)))


class DeepNormBlock(Block):
    """h = Norm(α x + Attention(x));  y = Norm(α h + FFN(h)),  α = (2 N)^¼ for N layers  (DeepNet, Wang et al. 2022).

    Values, attention output and feed-forward network start β = (8 N)^-¼ times as large as elsewhere. Both constants
    are those of a decoder without encoder (Figure 2).
    """

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.alpha = (2 * config.n_layer) ** 0.25
        beta = (8 * config.n_layer) ** -0.25
        for projection in (self.attention.v_proj, self.attention.o_proj, *self.ffn.modules()):
            if isinstance(projection, nn.Linear):
                setattr(projection, INITIAL_SCALE, beta)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.attention_norm(self.alpha * x + self.dropout(self.attention(x, **kwargs)[0]))
        return self.ffn_norm(self.alpha * x + self.dropout(self.ffn(x)))


class HybridNormBlock(Block):
    """h = x + Attention(x), its queries, keys and values normalized;  y = Norm(h) + FFN(Norm(h))  (HybridNorm).

    "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid Normalization" (Zhuo et al. 2025):
    QKV-Norm in attention and Post-Norm around the feed-forward network, which the paper writes, and its code computes,
    with the norm on both of the paths that leave h. The last block's output is thus not normalized: the paper keeps a
    final norm.
    """

    def __init__(self, config: NormfreeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_norm = nn.Identity()  # the norms of attention are inside it

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.ffn_norm(x + self.dropout(self.attention(x, **kwargs)[0]))
        return x + self.dropout(self.ffn(x))


def _mixed(config: NormfreeConfig, layer: int) -> type[Block]:
    """Post-Norm in the first ``n_post_layer`` blocks, Pre-Norm in the others (Mix-LN, Li et al. 2024)."""
    assert config.n_post_layer is not None, "the configuration sets it for mix"
    return PostNormBlock if layer < config.n_post_layer else PreNormBlock


PLACEMENTS: dict[str, Callable[[NormfreeConfig, int], type[Block]]] = {
    "pre": lambda config, layer: ParallelPreNormBlock if config.parallel_residual else PreNormBlock,
    "post": lambda config, layer: PostNormBlock,
    "mix": _mixed,
    "sandwich": lambda config, layer: SandwichNormBlock,
    "reordered": lambda config, layer: ReorderedNormBlock,
    "deepnorm": lambda config, layer: DeepNormBlock,
    "hybrid": lambda config, layer: HybridNormBlock,
    # HybridNorm*: the first block has Pre-Norm before attention and feed-forward network as well as QKV-Norm.
    "hybrid_star": lambda config, layer: PreNormBlock if layer == 0 else HybridNormBlock,
}

QKV_NORM_PLACEMENTS = ("hybrid", "hybrid_star")
"""Placements that normalize queries, keys and values inside attention."""


def build_block(config: NormfreeConfig, layer: int) -> Block:
    """Block ``layer`` (from 0)."""
    return PLACEMENTS[config.norm_placement](config, layer)(config, layer)
