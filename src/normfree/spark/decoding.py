"""Generation of Spark models that reads only active neurons and attended tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from normfree.errors import InputError
from normfree.spark.cache import spark_layer
from normfree.spark.decode import sparse_attention_decode, sparse_feed_forward
from normfree.spark.decode.backends import PREDICTOR_BY_NEURON, chosen_backend
from normfree.spark.sparse_attention import Rotation, SparkKeys
from normfree.spark.sparse_feed_forward import SparkFeedForward

Model = TypeVar("Model", bound=PreTrainedModel)
MAX_ROWS = 8
"""Positions, over the whole batch, up to which the sparse path is taken: each reads its own rows."""


@contextmanager
def sparse_decode(model: Model, *, backend: str = "auto") -> Iterator[Model]:
    """While active, ``model`` (in eval mode, without gradients) decodes its Spark layers sparsely.

        with normfree.sparse_decode(model):
            model.generate(**inputs)

    A pass over at most ``MAX_ROWS`` positions of the batch reads only the FFN's rows of active neurons; a query of one
    token a sequence reads only the keys and values of attended tokens. Everything else (a longer prompt, training)
    is computed as usual. Results equal those of the masked dense computation up to the rounding of sums.

    One or two of an FFN's three weights change their layout in memory, one weight at a time, and get it back at the
    end, so no memory is needed for copies. The layers of a ``DynamicCache`` become
    :class:`~normfree.spark.cache.SparkCacheLayer`, which remains usable afterwards.

    Args:
        model: with ``ffn`` or ``attention`` spark, and ``topk`` statistical.
        backend: as in :func:`normfree.spark.decode.sparse_feed_forward`.

    Raises:
        InputError: the model has no Spark layer, or chooses by another top-k, or has weights that are not plain
            ``nn.Linear`` (adapters, quantization); the backend is unknown or cannot be used.
    """
    config = model.config
    if "spark" not in (config.ffn, config.attention):
        raise InputError(
            f"there is nothing to decode sparsely: ffn is {config.ffn!r} and attention {config.attention!r}; "
            "one of them must be 'spark'"
        )
    if config.topk != "statistical":
        raise InputError(f"the sparse decode chooses by topk 'statistical', and this model by {config.topk!r}")
    chosen_backend(backend, next(model.parameters()))
    feed_forwards = [module for module in model.modules() if isinstance(module, SparkFeedForward)]
    attentions = [module for module in model.modules() if isinstance(module, SparkKeys)]
    for ffn in feed_forwards:
        _check_linear(ffn.predictor_proj, ffn.up_proj, ffn.down_proj)
    if any("forward" in vars(module) for module in (*feed_forwards, *attentions)):
        raise InputError("this model already decodes sparsely, or something else has replaced its layers' forward")
    try:
        for ffn in feed_forwards:
            name = chosen_backend(backend, ffn.predictor_proj.weight)
            _set_columns_contiguous(ffn.down_proj, *(() if name in PREDICTOR_BY_NEURON else (ffn.predictor_proj,)))
            ffn.forward = _SparseFeedForward(ffn, name)  # type: ignore[method-assign]
        for attention in attentions:
            attention.forward = _SparseAttention(attention, backend)
        yield model
    finally:
        for module in (*feed_forwards, *attentions):
            vars(module).pop("forward", None)
        for ffn in feed_forwards:
            _set_rows_contiguous(ffn.predictor_proj, ffn.down_proj)


class _SparseFeedForward:
    """The ``forward`` of a :class:`SparkFeedForward` whose weights have the layout of the decode."""

    def __init__(self, ffn: SparkFeedForward, backend: str) -> None:
        self.ffn, self.backend = ffn, backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ffn = self.ffn
        if _is_differentiated(ffn) or x.shape[:-1].numel() > MAX_ROWS:
            return SparkFeedForward.forward(ffn, x)
        out = sparse_feed_forward(
            x.reshape(-1, x.shape[-1]),
            ffn.predictor_proj.weight.t(),
            ffn.up_proj.weight.t(),
            ffn.down_proj.weight.t(),
            ffn.n_active,
            ffn.activation,
            predictor_bias=ffn.predictor_proj.bias,
            backend=self.backend,
        ).view(*x.shape[:-1], -1)
        return out if ffn.down_proj.bias is None else out + ffn.down_proj.bias


class _SparseAttention:
    """The ``forward`` of an attention with :class:`SparkKeys` that keeps its cache in two parts."""

    def __init__(self, attention: SparkKeys, backend: str) -> None:
        self.attention, self.backend = attention, backend
        self.forward = type(attention).forward

    def __call__(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Rotation | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention = self.attention
        if _is_differentiated(attention) or cache is None:
            return self.forward(attention, x, attention_mask, position_embeddings, cache, **kwargs)
        layer = spark_layer(cache, attention.layer_idx, attention.predictor_dim)
        if (x[0] if isinstance(x, tuple) else x).shape[1] > 1:
            return self.forward(attention, x, attention_mask, position_embeddings, cache, **kwargs)
        query, key, value = attention.project(x, position_embeddings)
        layer.append(key, value)
        attended = sparse_attention_decode(
            query[:, :, 0],
            layer.predictor_keys,
            layer.rest_keys,
            layer.stored_values,
            attention.n_active,
            predictor_scale=attention.scaling,
            rest_scale=attention.gate_scaling,
            visible=_visible(attention_mask, query.shape[0]),
            backend=self.backend,
        )
        return attention.o_proj(attended.flatten(1)[:, None]), None


def _is_differentiated(module: nn.Module) -> bool:
    return module.training or torch.is_grad_enabled()


def _visible(attention_mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """Bool [batch, T] of an additive mask [batch or 1, 1, 1, T]; None where it hides nothing."""
    if attention_mask is None:
        return None
    visible = attention_mask[:, 0, -1] > torch.finfo(attention_mask.dtype).min
    return visible.expand(batch, -1)


def _check_linear(*projections: nn.Module) -> None:
    for projection in projections:
        is_linear = isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward
        weight = projection._parameters.get("weight") if is_linear else None  # None: adapted or parametrized
        if weight is None or type(weight.data) is not torch.Tensor:
            raise InputError(
                f"the sparse decode reads plain nn.Linear weights, and this model has a {type(projection).__name__} "
                f"of {type(projection.weight.data).__name__}; merge adapters, or leave quantization out"
            )


def _set_columns_contiguous(*projections: nn.Linear) -> None:
    for projection in projections:
        projection.weight.data = projection.weight.data.t().contiguous().t()


def _set_rows_contiguous(*projections: nn.Linear) -> None:
    for projection in projections:
        projection.weight.data = projection.weight.data.contiguous()
