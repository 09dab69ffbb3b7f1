"""Transformer blocks: where the norms are applied, by name of the placement.

A new placement is one subclass of ``Block`` and one line in ``PLACEMENTS``. A block maps the residual stream
[batch, T, n_embd] to the residual stream, so a hook on a block's output reads the residual stream after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from normfree.errors import InputError
from normfree.model_options import one_of, option, option_of, probability
from normfree.modeling.attention import AttentionOptions, build_attention
from normfree.modeling.feed_forward import FeedForwardOptions, build_feed_forward
from normfree.modeling.initialization import INITIAL_SCALE
from normfree.modeling.norms import SCALED_NORMS, build_norm

QKV_NORM_PLACEMENTS = ("hybrid", "hybrid_star")
"""Placements that normalize queries, keys and values inside attention."""


@dataclass(kw_only=True)
class BlockOptions(AttentionOptions, FeedForwardOptions):
    """Blocks
    ``norm_placement``: ``pre | post | mix | sandwich | reordered | deepnorm | hybrid | hybrid_star`` (``reordered``
    normalizes the output of a sublayer before it is added, as OLMo 2 does; the hybrid placements have a QKV-norm of the
    kind of ``norm`` instead of ``qk_norm``); ``n_post_layer``: blocks in post placement, from the first (mix only;
    default a quarter of them, at least 1); ``parallel_residual``: attention and feed-forward network read the same
    input (pre placement only); ``residual_dropout``: 0 by default; ``scale_residual_init`` divides the initial weights
    of the projections into the residual stream by sqrt(2 ``n_layer``) (GPT-2); the deepnorm placement scales its own.
    """

    norm_placement: str = option("pre", check=one_of(lambda: PLACEMENTS))
    n_post_layer: int | None = option_of(
        "norm_placement", kinds=("mix",), fill=lambda options: max(1, options.n_layer // 4)
    )
    parallel_residual: bool = False
    residual_dropout: float | int = option(0.0, check=probability)
    scale_residual_init: bool = False

    @property
    def head_norms(self) -> dict[str, str]:
        """The norm over head_dim of each projection (q, k, v) that has one."""
        return dict.fromkeys("qkv", self.norm) if self.norm_placement in QKV_NORM_PLACEMENTS else super().head_norms

    def check_together(self) -> None:
        placement = self.norm_placement
        if placement != "pre":
            if self.norm == "none":
                raise InputError(f"norm_placement {placement!r} means nothing for norm 'none'; leave it out")
            if self.norm in SCALED_NORMS:
                raise InputError(f"norm {self.norm} is defined for norm_placement pre only, not {placement!r}")
            if self.parallel_residual:
                raise InputError(f"parallel_residual is defined for norm_placement pre only, not {placement!r}")
        if self.n_post_layer is not None and not 1 <= self.n_post_layer < self.n_layer:
            raise InputError(
                f"n_post_layer is {self.n_post_layer} of n_layer = {self.n_layer}; mix has both kinds of blocks: "
                "it must be from 1 to n_layer - 1"
            )
        if placement in QKV_NORM_PLACEMENTS and self.qk_norm != "none":
            raise InputError(
                f"qk_norm means nothing for norm_placement {placement!r}, which normalizes queries, keys and values "
                "itself; leave it out"
            )
        if placement == "deepnorm" and self.scale_residual_init:
            raise InputError(
                "scale_residual_init means nothing for norm_placement 'deepnorm', which scales the initial weights "
                "itself; leave it out"
            )


@dataclass(frozen=True)
class NormPlaces:
    """The names of a block's norms around one sublayer: x becomes OnSum(α x + After(sublayer(Before(x))))."""

    before: str | None = None
    after: str | None = None
    on_sum: str | None = None


class Block(GradientCheckpointingLayer):
    """The parts every placement has: attention, feed-forward network, a norm and a dropout for each."""

    around_attention: NormPlaces
    around_ffn: NormPlaces
    alpha = 1.0

    def __init__(self, config: BlockOptions, layer: int) -> None:
        super().__init__()
        self.layer_type = config.layer_types[layer]
        # Queries and keys read a norm before attention, and values do: with constant stds each has its own.
        n_reader = 2 if self.around_attention.before == "attention_norm" else 1
        self.attention_norm = build_norm(config, layer, "attention", n_reader)
        self.attention = build_attention(config, layer)
        self.ffn_norm = build_norm(config, layer, "ffn")
        self.ffn = build_feed_forward(config, layer)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


class PreNormBlock(Block):
    """h = x + Attention(Norm(x));  y = h + FFN(Norm(h))  (ReLU's Revival, Eq. 1)."""

    around_attention = NormPlaces(before="attention_norm")
    around_ffn = NormPlaces(before="ffn_norm")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), **kwargs)[0])
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class ParallelPreNormBlock(Block):
    """y = x + Attention(Norm₁(x)) + FFN(Norm₂(x))  (GPT-NeoX and Pythia, Black et al. 2022, Section 2.1)."""

    around_attention = NormPlaces(before="attention_norm")
    around_ffn = NormPlaces(before="ffn_norm")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.dropout(self.attention(self.attention_norm(x), **kwargs)[0])
        return self.dropout(self.ffn(self.ffn_norm(x))) + attended + x


class PostNormBlock(Block):
    """h = Norm(x + Attention(x));  y = Norm(h + FFN(h))  (Vaswani et al. 2017)."""

    around_attention = NormPlaces(on_sum="attention_norm")
    around_ffn = NormPlaces(on_sum="ffn_norm")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, **kwargs)[0]))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class SandwichNormBlock(Block):
    """h = x + Norm(Attention(Norm(x)));  y = h + Norm(FFN(Norm(h)))  (CogView, Ding et al. 2021, Section 2.4; Gemma 2).

    All four norms have gains of their own.
    """

    around_attention = NormPlaces(before="attention_norm", after="attention_output_norm")
    around_ffn = NormPlaces(before="ffn_norm", after="ffn_output_norm")

    def __init__(self, config: BlockOptions, layer: int) -> None:
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

    around_attention = NormPlaces(after="attention_norm")
    around_ffn = NormPlaces(after="ffn_norm")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.dropout(self.attention_norm(self.attention(x, **kwargs)[0]))
        return x + self.dropout(self.ffn_norm(self.ffn(x)))


class DeepNormBlock(Block):
    """h = Norm(α x + Attention(x));  y = Norm(α h + FFN(h)),  α = (2 N)^¼ for N layers  (DeepNet, Wang et al. 2022).

    Values, attention output and feed-forward network start β = (8 N)^-¼ times as large as elsewhere. Both constants
    are those of a decoder without encoder (Figure 2).
    """

    around_attention = NormPlaces(on_sum="attention_norm")
    around_ffn = NormPlaces(on_sum="ffn_norm")

    def __init__(self, config: BlockOptions, layer: int) -> None:
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

    around_attention = NormPlaces(on_sum="ffn_norm")
    around_ffn = NormPlaces()

    def __init__(self, config: BlockOptions, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_norm = nn.Identity()  # the norms of attention are inside it

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.ffn_norm(x + self.dropout(self.attention(x, **kwargs)[0]))
        return x + self.dropout(self.ffn(x))


def _mixed(config: BlockOptions, layer: int) -> type[Block]:
    """Post-Norm in the first ``n_post_layer`` blocks, Pre-Norm in the others (Mix-LN, Li et al. 2024)."""
    assert config.n_post_layer is not None, "filled in for mix"
    return PostNormBlock if layer < config.n_post_layer else PreNormBlock


PLACEMENTS: dict[str, Callable[[BlockOptions, int], type[Block]]] = {
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


def build_block(config: BlockOptions, layer: int) -> Block:
    """Block ``layer`` (from 0)."""
    return PLACEMENTS[config.norm_placement](config, layer)(config, layer)
