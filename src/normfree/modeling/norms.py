"""Normalization layers, by name.

A new norm is one ``nn.Module`` that maps [..., n_embd] to [..., n_embd] and one line in ``NORMS``. The builder gets
the layer index (from 0; ``None`` for the final norm), for norms that depend on depth, and the number of readers of its
output: two for an attention norm (queries and keys; values), to which a norm may give a reading each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from normfree.modeling.constant_std import ConstantStdNorm

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig

NORMS: dict[str, Callable[[NormfreeConfig, int | None, int], nn.Module]] = {
    "none": lambda config, layer, n_reader: nn.Identity(),
    # (x - mean) / sqrt(var + eps) * gain + bias (Ba et al., "Layer Normalization", 2016)
    "layernorm": lambda config, layer, n_reader: nn.LayerNorm(config.n_embd, eps=config.norm_eps),
    # x / sqrt(mean(x²) + eps) * gain (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)
    "rmsnorm": lambda config, layer, n_reader: nn.RMSNorm(config.n_embd, eps=config.norm_eps),
    "constant_std": lambda config, layer, n_reader: ConstantStdNorm(
        config.n_embd, n_reader=n_reader, is_centered=config.norm_is_centered
    ),
}


def build_norm(config: NormfreeConfig, layer: int, n_reader: int = 1) -> nn.Module:
    """A norm of the block ``layer`` (from 0)."""
    return NORMS[config.norm](config, layer, n_reader)


def build_final_norm(config: NormfreeConfig) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return NORMS[config.final_norm](config, None, 1)
