"""The options of the sparse layers: their defaults, what is refused, and shares as counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normfree.errors import InputError, unknown_name
from normfree.modeling.activations import LEAKY_ACTIVATIONS
from normfree.spark import TOPKS
from normfree.spark.selection import check_active, count_of
from normfree.spark.sparse_attention import rotated_pairs

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig

FFN_ACTIVE = 0.08
"""Share of neurons that "Spark Transformer" computes for a token (abstract)."""
ATTENTION_ACTIVE = 256
"""Keys at most that it attends to."""


@dataclass(frozen=True)
class SparkSizes:
    """The four sizes of the sparse layers, as counts; 0 for those of a layer that the model lacks.

    ffn_active: neurons of n_inner that are computed for a token (k).
    ffn_predictor_dim: dimensions of n_embd that choose them (r).
    attention_active: keys that a query attends to, at most.
    attention_predictor_dim: dimensions of head_dim that choose them.
    """

    ffn_active: int
    ffn_predictor_dim: int
    attention_active: int
    attention_predictor_dim: int

    @classmethod
    def of(cls, config: NormfreeConfig) -> SparkSizes:
        return cls(*(count_of(getattr(config, name) or 0, size(config)) for name, (size, _) in _SIZES.items()))


_SIZES: dict[str, tuple[Callable[[NormfreeConfig], int], Callable[[NormfreeConfig], int | float]]] = {
    "ffn_active": (lambda config: config.n_inner, lambda config: FFN_ACTIVE),
    "ffn_predictor_dim": (lambda config: config.n_embd, lambda config: config.n_embd // 2),
    "attention_active": (lambda config: config.n_positions, lambda config: ATTENTION_ACTIVE),
    "attention_predictor_dim": (lambda config: config.head_dim, lambda config: config.head_dim // 2),
}
"""Each option's whole, which a share is of, and its default."""


def settle_spark_options(config: NormfreeConfig) -> None:
    """Fills in the options of the sparse layers that ``config`` has, once its other sizes are known, and checks them.

    Raises:
        InputError: an option is out of range, or means nothing beside the others.
    """
    for name, (size, default) in _SIZES.items():
        part = name.split("_")[0]
        if getattr(config, part) != "spark":
            if getattr(config, name) is not None:
                raise InputError(
                    f"{name} means nothing for {part} {getattr(config, part)!r}; leave it out, or use {part}: spark"
                )
            continue
        if getattr(config, name) is None:
            setattr(config, name, default(config))
        is_predictor = name.endswith("predictor_dim")
        largest = size(config) - 1 if is_predictor else None if name == "attention_active" else size(config)
        check_active(name, getattr(config, name), largest)
        if is_predictor and count_of(getattr(config, name), size(config)) > size(config) - 1:
            raise InputError(f"{name} is {getattr(config, name)} of {size(config)}; at least one must be left")
    if "spark" not in (config.ffn, config.attention):
        if config.topk is not None:
            raise InputError(
                f"topk means nothing for ffn {config.ffn!r} and attention {config.attention!r}; leave it out"
            )
        return
    if config.topk is None:
        config.topk = "statistical"
    if config.topk not in TOPKS:
        raise unknown_name("topk", config.topk, TOPKS)
    leaky = sorted(set(config.activations) & set(LEAKY_ACTIVATIONS))
    if config.ffn == "spark" and leaky:
        raise InputError(
            f"activation {leaky[0]} means nothing with ffn 'spark': it differs from relu below zero only, where top-k "
            "leaves nothing; use relu"
        )


def check_spark_rotation(config: NormfreeConfig, rotary_dim: int) -> None:
    """Whether both parts of a head have at least one pair of dimensions to rotate.

    Raises:
        InputError: one has none.
    """
    if config.attention != "spark":
        return
    r = config.spark_sizes.attention_predictor_dim
    if min(rotated_pairs(width, config.head_dim, rotary_dim) for width in (r, config.head_dim - r)) < 1:
        raise InputError(
            f"attention_predictor_dim {r} of head_dim {config.head_dim} leaves a part without a pair of the "
            f"{rotary_dim} rotary dimensions; give both parts more, or raise partial_rotary_factor"
        )
