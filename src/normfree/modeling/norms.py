"""Normalization layers, by name.

A new norm is one ``nn.Module`` that maps [..., n_embd] to [..., n_embd] and one line in ``NORMS``. The builder gets
the layer index (from 0; ``None`` for the final norm), for norms that depend on depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig

NORMS: dict[str, Callable[[NormfreeConfig, int | None], nn.Module]] = {
    "none": lambda config, layer: nn.Identity(),
    # (x - mean) / sqrt(var + eps) * gain + bias (Ba et al., "Layer Normalization", 2016)
    "layernorm": lambda config, layer: nn.LayerNorm(config.n_embd, eps=config.norm_eps),
    # x / sqrt(mean(x²) + eps) * gain (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)
    "rmsnorm": lambda config, layer: nn.RMSNorm(config.n_embd, eps=config.norm_eps),
}


def build_norm(config: NormfreeConfig, layer: int) -> nn.Module:
    """A norm of the block ``layer`` (from 0)."""
    return NORMS[config.norm](config, layer)


def build_final_norm(config: NormfreeConfig) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return NORMS[config.final_norm](config, None)
