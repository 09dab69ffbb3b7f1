"""Normalization layers, by name.

A new norm is one ``nn.Module`` that maps [..., width] to [..., width] and one line in ``NORMS``. The builder gets the
``NormSite``: a norm may depend on its depth, and give each of two readers of its output a reading of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from normfree.modeling.constant_std import ConstantStdNorm

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig

NormPlace = Literal["attention", "ffn", "head", "unembedding"]
SCALED_NORMS = ("layernorm_scaling", "rmsnorm_scaling")
"""Norms of LayerNorm Scaling, which depend on the depth of their block."""


@dataclass(frozen=True)
class NormSite:
    """Where a norm stands.

    place: the sublayer that it belongs to; ``head`` for a norm of queries, keys or values, head by head.
    width: how many numbers it normalizes together.
    layer: its block, from 0; None before the unembedding.
    """

    place: NormPlace
    width: int
    layer: int | None

    @property
    def depth_scale(self) -> float:
        """1/sqrt(l) in the l-th block, l from 1."""
        assert self.layer is not None, "the configuration refuses depth scaling of the final norm"
        return (self.layer + 1) ** -0.5


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm(x) / sqrt(l) in the l-th block, gain and bias included ("The Curse of Depth", Eq. 12)."""

    def __init__(self, width: int, eps: float, scale: float) -> None:
        super().__init__(width, eps=eps)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Scaling the gain, not the output, saves a pass over the activations.
        return F.layer_norm(x, self.normalized_shape, self.weight * self.scale, self.bias * self.scale, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * gain (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019).

    Under autocast, half-precision input (queries, keys, values) meets a float32 gain: the result is then float32.
    torch's own would round it, and warn that it has no fused kernel for the pair.
    """

    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = self.weight if self.scale == 1 else self.weight * self.scale
        return F.rms_norm(x.to(torch.promote_types(x.dtype, gain.dtype)), self.normalized_shape, gain, self.eps)


class ScaledRMSNorm(RMSNorm):
    """RMSNorm(x) / sqrt(l) in the l-th block, gain included ("The Curse of Depth", Eq. 12, in its LLaMA models)."""

    def __init__(self, width: int, eps: float, scale: float) -> None:
        super().__init__(width, eps=eps)
        self.scale = scale


class DynamicTanh(nn.Module):
    """tanh(α x) ⊙ gain + bias, α one learned number ("Transformers without Normalization", Section 4).

    It has no statistics: each number is squashed alone. ``alpha`` has shape [1], not [ ]: sharded data parallelism
    takes no scalars. The public code of the paper's LLaMA models leaves the bias out; its text has it.
    """

    def __init__(self, width: int, initial_alpha: float) -> None:
        super().__init__()
        self.initial_alpha = initial_alpha
        self.alpha = nn.Parameter(torch.full((1,), initial_alpha))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


def _dynamic_tanh(config: NormfreeConfig, site: NormSite) -> DynamicTanh:
    alpha = config.dyt_attention_alpha if site.place in ("attention", "head") else config.dyt_alpha
    assert alpha is not None, "the configuration sets both for dyt"
    return DynamicTanh(site.width, alpha)


NORMS: dict[str, Callable[[NormfreeConfig, NormSite], nn.Module]] = {
    "none": lambda config, site: nn.Identity(),
    # (x - mean) / sqrt(var + eps) * gain + bias (Ba et al., "Layer Normalization", 2016)
    "layernorm": lambda config, site: nn.LayerNorm(site.width, eps=config.norm_eps),
    "rmsnorm": lambda config, site: RMSNorm(site.width, eps=config.norm_eps),
    "layernorm_scaling": lambda config, site: ScaledLayerNorm(site.width, config.norm_eps, site.depth_scale),
    "rmsnorm_scaling": lambda config, site: ScaledRMSNorm(site.width, config.norm_eps, site.depth_scale),
    "dyt": _dynamic_tanh,
    # Attention reads it twice: queries and keys; values.
    "constant_std": lambda config, site: ConstantStdNorm(
        site.width, n_reader=2 if site.place == "attention" else 1, is_centered=config.norm_is_centered
    ),
}


def build_norm(config: NormfreeConfig, layer: int, place: NormPlace) -> nn.Module:
    """A norm of the residual stream in block ``layer`` (from 0)."""
    return NORMS[config.norm](config, NormSite(place, config.n_embd, layer))


def build_final_norm(config: NormfreeConfig) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return NORMS[config.final_norm](config, NormSite("unembedding", config.n_embd, None))
