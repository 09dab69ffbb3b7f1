"""Checked inputs of the kernels of sparse decode: n queries of d = r + rest dimensions; the predictor reads r."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normfree.errors import InputError
from normfree.spark.selection import check_active, count_of

Activation = Callable[[Tensor], Tensor]
"""Elementwise, with activation(0) = 0: neurons below the threshold then add nothing."""


class PackedFeedForward(NamedTuple):
    """The weights of a Spark FFN in the layout of a backend: same numbers, other strides.

    K1: the predictor [r, d_ff]. For ``cpu`` one row a neuron, as K2; for the others contiguous.
    K2: the multiplier [d_ff, rest] seen as [rest, d_ff] (``K2.t()`` is contiguous): one row a neuron.
    V: the output [d_ff, d], contiguous: one row a neuron.
    """

    K1: Tensor
    K2: Tensor
    V: Tensor


class FeedForwardInputs(NamedTuple):
    """Checked arguments of ``sparse_feed_forward``, q [n, d]."""

    q: Tensor
    K1: Tensor
    K2: Tensor
    V: Tensor
    k: int
    activation: Activation
    predictor_bias: Tensor | None
    rest_bias: Tensor | None


class AttentionInputs(NamedTuple):
    """Checked arguments of ``sparse_attention_decode``, q [batch, n_head, r + rest], keys of at least one token."""

    q: Tensor
    predictor_keys: Tensor
    rest_keys: Tensor
    values: Tensor
    k: int | float
    visible: Tensor | None
    predictor_scale: float
    rest_scale: float


def check_feed_forward(inputs: FeedForwardInputs, k: int | float, *, predictor_by_neuron: bool) -> FeedForwardInputs:
    """The inputs with ``k`` as a count; K1 has to have one row a neuron in memory, or else one a dimension.

    Raises:
        InputError: shapes, dtypes, devices, layouts or k do not fit.
    """
    q, K1, K2, V = inputs[:4]
    if any(each.dim() != 2 for each in (q, K1, K2, V)):
        shapes = ", ".join(str(list(each.shape)) for each in (q, K1, K2, V))
        raise InputError(f"q, K1, K2 and V must be [n, d], [r, d_ff], [d - r, d_ff] and [d_ff, d], got {shapes}")
    d, (r, n_inner) = q.shape[1], K1.shape
    if not 0 < r < d:
        raise InputError(f"r is {r}; the predictor must read between 1 and {d - 1} of the {d} dimensions of q")
    if K2.shape != (d - r, n_inner) or V.shape[0] != n_inner:
        raise InputError(
            f"with q of {d} dimensions and K1 {list(K1.shape)}, K2 must be [{d - r}, {n_inner}] and V [{n_inner}, d], "
            f"got {list(K2.shape)} and {list(V.shape)}"
        )
    check_active("k", k, n_inner)
    _check_same("q, K1, K2 and V", q, K1, K2, V)
    for name, bias in (("predictor_bias", inputs.predictor_bias), ("rest_bias", inputs.rest_bias)):
        if bias is not None and bias.shape != (n_inner,):
            raise InputError(f"{name} must be [{n_inner}], got {list(bias.shape)}")
    predictor = K1.t() if predictor_by_neuron else K1
    if not (predictor.is_contiguous() and K2.t().is_contiguous() and V.is_contiguous()):
        raise InputError("K1, K2 and V do not have the layout of the backend: pack them once with pack_feed_forward")
    return inputs._replace(k=count_of(k, n_inner))


def check_attention(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs, with keys and values whose tokens are contiguous rows.

    Raises:
        InputError: shapes, dtypes, devices or k do not fit.
    """
    q, predictor, rest, values = inputs[:4]
    if q.dim() != 3 or any(each.dim() != 4 for each in (predictor, rest, values)):
        raise InputError(
            f"q must be [batch, n_head, head_dim] and keys and values [batch, n_kv_head, n_key, dim], got "
            f"{list(q.shape)}, {list(predictor.shape)}, {list(rest.shape)} and {list(values.shape)}"
        )
    if not predictor.shape[:3] == rest.shape[:3] == values.shape[:3] or predictor.shape[0] != q.shape[0]:
        raise InputError(
            f"q {list(q.shape)}, predictor keys {list(predictor.shape)}, rest keys {list(rest.shape)} and values "
            f"{list(values.shape)} do not have one batch, number of key and value heads and number of keys"
        )
    n_head, n_kv_head, head_dim = q.shape[1], predictor.shape[1], q.shape[2]
    if n_head % n_kv_head:
        raise InputError(f"n_head ({n_head}) is not divisible by n_kv_head ({n_kv_head})")
    if not 0 < predictor.shape[3] < head_dim or predictor.shape[3] + rest.shape[3] != head_dim:
        raise InputError(
            f"r is {predictor.shape[3]} and the rest {rest.shape[3]}; both must be at least 1, and together the "
            f"{head_dim} dimensions of q"
        )
    check_active("k", inputs.k, None)
    if predictor.shape[2] == 0:
        raise InputError("there are no keys: a query attends to its own at least")
    _check_same("q, keys and values", q, predictor, rest, values)
    visible = inputs.visible
    if visible is not None and (visible.dtype != torch.bool or visible.shape != (q.shape[0], predictor.shape[2])):
        raise InputError(
            f"visible must be bool [{q.shape[0]}, {predictor.shape[2]}], got {visible.dtype} {list(visible.shape)}"
        )
    predictor, rest, values = (_with_token_rows(each) for each in (predictor, rest, values))
    return inputs._replace(predictor_keys=predictor, rest_keys=rest, values=values)


def _with_token_rows(x: Tensor) -> Tensor:
    """x [batch, n_kv_head, n_key, dim] with each head's tokens in contiguous rows: a view of a cache is left alone."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _check_same(what: str, *tensors: Tensor) -> None:
    dtypes, devices = {each.dtype for each in tensors}, {each.device for each in tensors}
    if len(dtypes) > 1 or not tensors[0].is_floating_point():
        raise InputError(f"{what} must have one float dtype, got {', '.join(sorted(str(each) for each in dtypes))}")
    if len(devices) > 1:
        raise InputError(f"{what} must be on one device, got {', '.join(sorted(str(each) for each in devices))}")
