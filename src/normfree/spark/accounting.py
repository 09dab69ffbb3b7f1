"""The cost of decoding one token, part by part, computed from a model's shape and its sparsity.

A multiply-add counts as two floating-point operations. Products with weights, keys and values are counted. Norms,
activations, softmax, rotary positions and top-k are not: together less than a percent of a model of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from normfree.errors import InputError
from normfree.spark.sizes import TOPK_FFNS, SparkSizes

PARTS = (
    "attention projections",
    "attention predictor",
    "attention scores",
    "attention values",
    "ffn predictor",
    "ffn in",
    "ffn out",
    "unembedding",
)
"""Every part, in the order of the computation. Predictors reduce "attention scores" and "ffn in"."""


class Shape(Protocol):
    """The sizes of a model, such as a :class:`normfree.NormfreeConfig`."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_inner: int
    ffn: str
    attention: str

    @property
    def spark_sizes(self) -> SparkSizes: ...


@dataclass(frozen=True)
class PartCost:
    """One part of one layer, for one token of one sequence.

    layer: from 0; None for the unembedding.
    flops: floating-point operations, two a multiply-add.
    weight_bytes, cache_bytes: bytes of weights and of cached keys and values that it reads.
    """

    layer: int | None
    part: str
    flops: float
    weight_bytes: float
    cache_bytes: float

    @property
    def bytes_read(self) -> float:
        return self.weight_bytes + self.cache_bytes


def decode_cost(
    shape: Shape,
    *,
    context_length: float | Sequence[float],
    active_share: float | Sequence[float] | None = None,
    attended_keys: float | Sequence[float] | None = None,
    bytes_per_weight: float = 2.0,
    bytes_per_cached: float = 2.0,
) -> tuple[PartCost, ...]:
    """The cost of the next token, by layer and part.

    A dense or gated network with an ``active_share`` (a ReLU network's natural sparsity) skips rows of its last
    weight, and a gated one rows of the projection that is not the gate. Query heads that share keys read the rest of
    the keys that any of them chose, at most all.

    Args:
        shape: sizes and kinds of layers.
        context_length: keys that the token can see, itself included; one number, or one a layer where windows differ.
        active_share: share of the neurons that are not zero, of all layers or of each; default: k/n_inner of a sparse
            network, else 1.
        attended_keys: keys that a query attends to, likewise; default: min(k, context) of sparse attention.
        bytes_per_weight, bytes_per_cached: 2 for bfloat16.

    Raises:
        InputError: a list is not one number a layer, or a number is out of range.
    """
    sizes = shape.spark_sizes
    nominal = sizes.ffn_active / shape.n_inner if shape.ffn in TOPK_FFNS else 1.0
    contexts = _by_layer("context_length", context_length, shape.n_layer, low=1)
    shares = _by_layer("active_share", nominal if active_share is None else active_share, shape.n_layer, high=1)
    if attended_keys is not None and shape.attention != "spark":
        raise InputError(f"attended_keys means nothing for attention {shape.attention!r}, which attends to all keys")
    wanted = sizes.attention_active if attended_keys is None else attended_keys
    attended = _by_layer("attended_keys", wanted, shape.n_layer)
    costs = []
    for layer in range(shape.n_layer):
        for part, flops, n_weight, n_cached in (
            *_attention(shape, contexts[layer], min(attended[layer], contexts[layer])),
            *_feed_forward(shape, shares[layer]),
        ):
            costs.append(PartCost(layer, part, flops, n_weight * bytes_per_weight, n_cached * bytes_per_cached))
    n_weight = shape.n_embd * shape.vocab_size
    costs.append(PartCost(None, "unembedding", 2.0 * n_weight, n_weight * bytes_per_weight, 0.0))
    return tuple(costs)


def total_flops(costs: Iterable[PartCost], *, unembedding: bool = True) -> float:
    """Floating-point operations of all parts, with or without the unembedding, which has no sparse form."""
    return sum(each.flops for each in costs if unembedding or each.part != "unembedding")


def total_bytes(costs: Iterable[PartCost], *, unembedding: bool = True) -> float:
    """Bytes of weights and cache that all parts read, with or without the unembedding."""
    return sum(each.bytes_read for each in costs if unembedding or each.part != "unembedding")


_Part = tuple[str, float, float, float]
"""Name, FLOPs, weights read, cached numbers read."""


def _attention(shape: Shape, context: float, attended: float) -> tuple[_Part, ...]:
    queries, keys = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    projections = shape.n_embd * (2.0 * queries + 2.0 * keys)
    parts: list[_Part] = [("attention projections", 2 * projections, projections, 0.0)]
    if shape.attention != "spark":
        dense = (2.0 * queries * context, 0.0, keys * context)
        return (*parts, ("attention scores", *dense), ("attention values", *dense))
    r = shape.spark_sizes.attention_predictor_dim
    rest = shape.head_dim - r
    parts.append(("attention predictor", 2.0 * shape.n_head * r * context, 0.0, shape.n_kv_head * r * context))
    read = min(shape.n_head * attended, shape.n_kv_head * context)
    parts.append(("attention scores", 2.0 * shape.n_head * rest * attended, 0.0, rest * read))
    parts.append(("attention values", 2.0 * queries * attended, 0.0, shape.head_dim * read))
    return tuple(parts)


def _feed_forward(shape: Shape, active_share: float) -> tuple[_Part, ...]:
    whole, active = float(shape.n_embd * shape.n_inner), active_share * shape.n_embd * shape.n_inner
    if shape.ffn == "spark":
        r = shape.spark_sizes.ffn_predictor_dim
        predictor, first = float(r * shape.n_inner), active_share * (shape.n_embd - r) * shape.n_inner
    else:
        predictor, first = 0.0, whole + active if shape.ffn == "gated" else whole
    counts = {"ffn predictor": predictor, "ffn in": first, "ffn out": active}
    return tuple((part, 2 * count, count, 0.0) for part, count in counts.items() if part != "ffn predictor" or count)


def _by_layer(
    name: str, given: float | Sequence[float], n_layer: int, *, low: float = 0, high: float = float("inf")
) -> list[float]:
    values = [float(each) for each in given] if isinstance(given, Sequence) else [float(given)] * n_layer
    if len(values) != n_layer:
        raise InputError(f"{name} lists {len(values)} numbers for n_layer = {n_layer}; give one, or one a layer")
    for value in values:
        if not low <= value <= high:
            raise InputError(f"{name} is {value:g}; it must be from {low:g} to {high:g}")
    return values
