"""Norms of queries, keys and values inside attention, by name: [..., heads, head_dim] to the same shape.

A new one is one ``nn.Module`` and one line in ``QK_NORMS``; the builder gets the number of heads of its projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from normfree.modeling.norms import NORMS, NormSite, RMSNorm

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig


class FullWidthRMSNorm(RMSNorm):
    """RMSNorm over all heads of a projection at once, one gain per head and dimension (OLMo 2, 2025, Section 3.2)."""

    def __init__(self, n_head: int, head_dim: int, eps: float) -> None:
        super().__init__(n_head * head_dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view(x.shape)


class PerHeadLayerNorm(nn.Module):
    """LayerNorm over head_dim with one gain per head and dimension and no bias (Stable LM 2 12B, 2024).

    The gains are one vector [heads head_dim]: what tells gains from matrices by their shape sees a gain.
    """

    def __init__(self, n_head: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_head * head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.view(x.shape[-2:])


def _shared_by_heads(name: str) -> Callable[[NormfreeConfig, int, int], nn.Module]:
    """A norm of the residual stream taken over head_dim, with gains that all heads share."""
    return lambda config, layer, n_head: NORMS[name](config, NormSite("head", config.head_dim, layer))


QK_NORMS: dict[str, Callable[[NormfreeConfig, int, int], nn.Module]] = {
    "none": _shared_by_heads("none"),
    "layernorm": _shared_by_heads("layernorm"),
    "rmsnorm": _shared_by_heads("rmsnorm"),
    "rmsnorm_full_width": lambda config, layer, n_head: FullWidthRMSNorm(n_head, config.head_dim, config.norm_eps),
    "layernorm_per_head": lambda config, layer, n_head: PerHeadLayerNorm(n_head, config.head_dim, config.norm_eps),
}
"""Values of ``qk_norm``, and what makes each from (config, layer, heads of the projection)."""


def build_head_norm(config: NormfreeConfig, layer: int, projection: str) -> nn.Module:
    """The norm of what ``projection`` (q, k or v) makes in block ``layer`` (from 0), if it has one."""
    name = config.head_norms.get(projection, "none")
    build = QK_NORMS[name] if name in QK_NORMS else _shared_by_heads(name)
    return build(config, layer, config.n_head if projection == "q" else config.n_kv_head)
