"""Normalization layers, by name.

A new norm is one ``nn.Module`` that maps [..., width] to [..., width] and one line in ``NORMS``; its own option is one
line in ``NormOptions``. The builder gets the ``NormSite``: a norm may depend on its depth, and it may return one result
for each of two readers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from normfree.errors import InputError
from normfree.model_options import Dimensions, finite, one_of, option, option_of, positive
from normfree.modeling.constant_std import ConstantStdNorm

NormPlace = Literal["attention", "ffn", "head", "unembedding"]
SCALED_NORMS = ("layernorm_scaling", "rmsnorm_scaling")
"""Norms of LayerNorm Scaling, which depend on the depth of their block."""
POINTWISE_NORMS = {"dyt": "a tanh", "derf": "an erf"}
"""Norms without statistics, and the function that each applies to every number."""


@dataclass(frozen=True)
class NormSite:
    """Where a norm is applied.

    place: the sublayer that it belongs to; ``head`` for a norm of queries, keys or values, head by head.
    width: how many numbers it normalizes together.
    layer: its block, from 0; None before the unembedding.
    n_reader: results of a constant_std norm, each with a std of its own.
    """

    place: NormPlace
    width: int
    layer: int | None
    n_reader: int = 1

    @property
    def is_in_attention(self) -> bool:
        return self.place in ("attention", "head")

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

    It has no statistics: each number is squashed separately. ``alpha`` has shape [1], not [ ]: sharded data parallelism
    takes no scalars. The public code of the paper's LLaMA models leaves the bias out; its text has it.
    """

    def __init__(self, width: int, initial_alpha: float) -> None:
        super().__init__()
        self.initial_alpha = initial_alpha
        self.alpha = nn.Parameter(torch.full((1,), float(initial_alpha)))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def set_initial_values(self) -> None:
        init.constant_(self.alpha, self.initial_alpha)
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class DynamicErf(nn.Module):
    """erf(α x + s) ⊙ gain + bias, α and s one learned number each ("Stronger Normalization-Free Transformers", 2025).

    It has no statistics, as :class:`DynamicTanh`, and its ``alpha`` and ``shift`` have shape [1] for the same reason.
    """

    def __init__(self, width: int, initial_alpha: float, initial_shift: float) -> None:
        super().__init__()
        self.initial_alpha, self.initial_shift = initial_alpha, initial_shift
        self.alpha = nn.Parameter(torch.full((1,), float(initial_alpha)))
        self.shift = nn.Parameter(torch.full((1,), float(initial_shift)))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def set_initial_values(self) -> None:
        init.constant_(self.alpha, self.initial_alpha)
        init.constant_(self.shift, self.initial_shift)
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(self.alpha * x + self.shift) * self.weight + self.bias


@dataclass(kw_only=True)
class NormOptions(Dimensions):
    """Norms
    ``norm`` (in the blocks) and ``final_norm`` (before the unembedding): ``none | layernorm | rmsnorm | dyt |
    derf | constant_std``, and for ``norm`` ``layernorm_scaling | rmsnorm_scaling`` (times 1/sqrt(layer), layers from
    1); ``norm_eps``; ``dyt_alpha``: initial α of dyt, default 0.5, and ``dyt_attention_alpha``: another one for the
    norms of attention, default the same; ``derf_alpha`` and ``derf_shift``: initial α and s of derf, default 0.5 and 0;
    ``norm_is_centered`` (constant_std only): whether it replaces a LayerNorm, which subtracts the mean, or an RMSNorm;
    ``final_norm_is_centered``: the same of final_norm, default ``norm_is_centered``.
    """

    norm: str = option("layernorm", check=one_of(lambda: NORMS))
    final_norm: str = option("layernorm", check=one_of(lambda: NORMS))
    norm_eps: float | int = option(1e-5, check=positive)
    norm_is_centered: bool = option_of("norm", "final_norm", kinds=("constant_std",), default=True)
    final_norm_is_centered: bool | None = option_of(
        "final_norm", kinds=("constant_std",), fill=lambda options: options.norm_is_centered
    )
    dyt_alpha: float | int | None = option_of("norm", "final_norm", kinds=("dyt",), check=positive, fill=0.5)
    dyt_attention_alpha: float | int | None = option_of(
        "norm", kinds=("dyt",), check=positive, fill=lambda options: options.dyt_alpha
    )
    derf_alpha: float | int | None = option_of("norm", "final_norm", kinds=("derf",), check=positive, fill=0.5)
    derf_shift: float | int | None = option_of("norm", "final_norm", kinds=("derf",), check=finite, fill=0.0)

    def check_together(self) -> None:
        if self.final_norm in SCALED_NORMS:
            raise InputError(
                f"final_norm {self.final_norm!r} means nothing: the final norm is in no layer; "
                f"use {self.final_norm.removesuffix('_scaling')}"
            )


def _dynamic_tanh(options: NormOptions, site: NormSite) -> DynamicTanh:
    alpha = options.dyt_attention_alpha if site.is_in_attention else options.dyt_alpha
    assert alpha is not None, "filled in for dyt"
    return DynamicTanh(site.width, alpha)


def _dynamic_erf(options: NormOptions, site: NormSite) -> DynamicErf:
    assert options.derf_alpha is not None, "filled in for derf"
    assert options.derf_shift is not None, "filled in for derf"
    return DynamicErf(site.width, options.derf_alpha, options.derf_shift)


NORMS: dict[str, Callable[[NormOptions, NormSite], nn.Module]] = {
    "none": lambda options, site: nn.Identity(),
    # (x - mean) / sqrt(var + eps) * gain + bias (Ba et al., "Layer Normalization", 2016)
    "layernorm": lambda options, site: nn.LayerNorm(site.width, eps=options.norm_eps),
    "rmsnorm": lambda options, site: RMSNorm(site.width, eps=options.norm_eps),
    "layernorm_scaling": lambda options, site: ScaledLayerNorm(site.width, options.norm_eps, site.depth_scale),
    "rmsnorm_scaling": lambda options, site: ScaledRMSNorm(site.width, options.norm_eps, site.depth_scale),
    "dyt": _dynamic_tanh,
    "derf": _dynamic_erf,
    "constant_std": lambda options, site: ConstantStdNorm(
        site.width,
        n_reader=site.n_reader,
        is_centered=bool(options.norm_is_centered if site.layer is not None else options.final_norm_is_centered),
    ),
}


def build_norm(options: NormOptions, layer: int, place: NormPlace, n_reader: int = 1) -> nn.Module:
    """A norm of the residual stream in block ``layer`` (from 0)."""
    return NORMS[options.norm](options, NormSite(place, options.n_embd, layer, n_reader))


def build_final_norm(options: NormOptions) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return NORMS[options.final_norm](options, NormSite("unembedding", options.n_embd, None))
