"""Norms of queries, keys and values inside attention, by name: [..., heads, head_dim] to the same shape.

A new one is one ``nn.Module`` and one line in ``QK_NORMS``; the builder gets the number of heads of its projection.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from normfree.model_options import Named, one_of, option, option_of
from normfree.modeling.constant_std import ConstantStdHeadNorm
from normfree.modeling.norms import NORMS, NormOptions, NormSite, RMSNorm

KINDS_OF_QK_NORM = ("layernorm", "rmsnorm", "rmsnorm_full_width", "layernorm_per_head")


class FullWidthRMSNorm(RMSNorm):
    """RMSNorm over all heads of a projection at once, one gain per head and dimension (OLMo 2, 2025, Section 3.2)."""

    def __init__(self, n_head: int, head_dim: int, eps: float) -> None:
        super().__init__(n_head * head_dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view(x.shape)


class PerHeadLayerNorm(nn.Module):
    """LayerNorm over head_dim with one gain per head and dimension and no bias (Stable LM 2 12B, 2024).

    The gains are one vector [heads head_dim], so that they are not mistaken for a matrix.
    """

    def __init__(self, n_head: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_head * head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.view(x.shape[-2:])


def _like_norm(options: "QKNormOptions", value: str | bool) -> str:
    if not isinstance(value, bool):
        return value
    kind = "layernorm" if options.norm in ("layernorm", "layernorm_scaling") else "rmsnorm"
    return kind if value else "none"


@dataclass(kw_only=True)
class QKNormOptions(NormOptions):
    """QK-norm
    ``qk_norm``: norm of queries and keys over head_dim, ``none | layernorm | rmsnorm`` (also ``False`` for ``none``,
    ``True`` for the kind that ``norm`` is, RMSNorm where that has none), ``layernorm_per_head`` (each head has gains of
    its own) or ``rmsnorm_full_width`` (over all heads together); ``qk_norm_is_constant``: whether it divides by one
    constant std per head (per projection for rmsnorm_full_width) instead of each token's own.
    """

    qk_norm: Named = option("none", check=one_of(lambda: QK_NORMS), read=_like_norm)
    qk_norm_is_constant: bool = option_of("qk_norm", kinds=KINDS_OF_QK_NORM, default=False)

    @property
    def head_norms(self) -> dict[str, str]:
        """The norm over head_dim of each projection (q, k, v) that has one."""
        return {} if self.qk_norm == "none" else dict.fromkeys("qk", self.qk_norm)


def _shared_by_heads(name: str) -> Callable[[QKNormOptions, int, int], nn.Module]:
    """A norm of the residual stream taken over head_dim, with gains that all heads share."""
    return lambda options, layer, n_head: NORMS[name](options, NormSite("head", options.head_dim, layer))


QK_NORMS: dict[str, Callable[[QKNormOptions, int, int], nn.Module]] = {
    "none": _shared_by_heads("none"),
    "layernorm": _shared_by_heads("layernorm"),
    "rmsnorm": _shared_by_heads("rmsnorm"),
    "rmsnorm_full_width": lambda options, layer, n_head: FullWidthRMSNorm(n_head, options.head_dim, options.norm_eps),
    "layernorm_per_head": lambda options, layer, n_head: PerHeadLayerNorm(n_head, options.head_dim, options.norm_eps),
}
"""Values of ``qk_norm``, and what builds each from (options, layer, heads of the projection)."""


def constant_head_norm(norm: nn.Module, n_head: int, head_dim: int) -> ConstantStdHeadNorm:
    """The norm with constant stds that can hold the gain and bias of ``norm``."""
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm, PerHeadLayerNorm))
    return ConstantStdHeadNorm(
        head_dim,
        n_gain=norm.weight.numel(),
        n_std=1 if isinstance(norm, FullWidthRMSNorm) else n_head,
        is_centered=not isinstance(norm, nn.RMSNorm),
        is_biased=isinstance(norm, nn.LayerNorm),
    )


def build_head_norm(options: QKNormOptions, layer: int, projection: str) -> nn.Module:
    """The norm of the output of ``projection`` (q, k or v) in block ``layer`` (from 0); the identity if it has none."""
    name = options.head_norms.get(projection, "none")
    n_head = options.n_head if projection == "q" else options.n_kv_head
    if name == "constant_std":  # of a placement that normalizes queries, keys and values
        name, is_constant = "layernorm" if options.norm_is_centered else "rmsnorm", True
    else:
        is_constant = options.qk_norm_is_constant and name != "none"
    norm = (QK_NORMS[name] if name in QK_NORMS else _shared_by_heads(name))(options, layer, n_head)
    return constant_head_norm(norm, n_head, options.head_dim) if is_constant else norm
