"""The options of the sparse layers, and their shares as counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from normfree.errors import InputError
from normfree.model_options import Dimensions, one_of, option_of
from normfree.spark.selection import check_active, count_of
from normfree.spark.sparse_attention import rotated_pairs
from normfree.spark.topk import TOPKS

FFN_ACTIVE = 0.08
"""Share of neurons that "Spark Transformer" computes for a token (abstract)."""
ATTENTION_ACTIVE = 256
"""Most keys that a query of "Spark Transformer" attends to (abstract)."""
SPARK = ("spark",)
TOPK_FFNS = ("spark", "topk")
"""Feed-forward networks that choose neurons."""


@dataclass(frozen=True)
class SparkSizes:
    """The four sizes of the sparse layers, as counts; 0 for those of a layer that the model lacks.

    ffn_active: neurons of n_inner that are kept for a token (k).
    ffn_predictor_dim: dimensions of n_embd that choose them (r).
    attention_active: keys that a query attends to, at most.
    attention_predictor_dim: dimensions of head_dim that choose them.
    """

    ffn_active: int
    ffn_predictor_dim: int
    attention_active: int
    attention_predictor_dim: int


@dataclass(kw_only=True)
class SparkOptions(Dimensions):
    """Sparsity (``ffn`` spark or topk, ``attention`` spark), each a count, or a float: a share
    ``ffn_active``: neurons kept for a token, default 0.08 of ``n_inner``; ``ffn_predictor_dim`` (spark): dimensions of
    ``n_embd`` that choose them, default half; ``attention_active``: keys that a query attends to at most, default 256
    (a share is one of ``n_positions``); ``attention_predictor_dim``: dimensions of ``head_dim`` that choose them,
    default half; ``topk``: ``statistical | exact``.
    """

    ffn_active: float | int | None = option_of("ffn", kinds=TOPK_FFNS, use="ffn: spark or topk", fill=FFN_ACTIVE)
    ffn_predictor_dim: float | int | None = option_of(
        "ffn", kinds=SPARK, use="ffn: spark", fill=lambda options: options.n_embd // 2
    )
    attention_active: float | int | None = option_of(
        "attention", kinds=SPARK, use="attention: spark", fill=ATTENTION_ACTIVE
    )
    attention_predictor_dim: float | int | None = option_of(
        "attention", kinds=SPARK, use="attention: spark", fill=lambda options: options.head_dim // 2
    )
    topk: str | None = option_of("ffn", "attention", kinds=TOPK_FFNS, fill="statistical", check=one_of(TOPKS))

    @property
    def spark_sizes(self) -> SparkSizes:
        """The sizes of the sparse layers, as counts."""
        return SparkSizes(*(count_of(getattr(self, name) or 0, whole(self)) for name, whole in _WHOLES.items()))

    def check_together(self) -> None:
        for name, whole in _WHOLES.items():
            value, size = getattr(self, name), whole(self)
            if value is None:
                continue
            if not name.endswith("predictor_dim"):
                check_active(name, value, None if name == "attention_active" else size)
                continue
            check_active(name, value, size - 1)
            if count_of(value, size) > size - 1:
                raise InputError(f"{name} is {value} of {size}; at least one must be left")

    def check_spark_rotation(self, rotary_dim: int) -> None:
        """Checks that both parts of a head of sparse attention have at least one pair of dimensions to rotate.

        Raises:
            InputError: one has none.
        """
        r = self.spark_sizes.attention_predictor_dim
        if r and min(rotated_pairs(width, self.head_dim, rotary_dim) for width in (r, self.head_dim - r)) < 1:
            raise InputError(
                f"attention_predictor_dim {r} of head_dim {self.head_dim} leaves a part without a pair of the "
                f"{rotary_dim} rotary dimensions; give both parts more, or raise partial_rotary_factor"
            )


_WHOLES: dict[str, Callable[[Any], int]] = {
    "ffn_active": lambda options: options.n_inner,
    "ffn_predictor_dim": lambda options: options.n_embd,
    "attention_active": lambda options: options.n_positions,
    "attention_predictor_dim": lambda options: options.head_dim,
}
"""What a share of each option is a share of."""
