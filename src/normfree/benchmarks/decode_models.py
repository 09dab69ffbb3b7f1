"""Models and caches with random values to time decode; their dense products can be those of csrc/."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.initialization import ResidualProjection
from normfree.spark.cache import SparkCacheLayer
from normfree.spark.decode.extension import all_dots, weighted_rows
from normfree.spark.sparse_feed_forward import SparkFeedForward

ROOM = 2048
"""Spare capacity of a cache in tokens, added at creation and on each growth."""


class Linear(nn.Linear):
    """``nn.Linear`` that can compute products with one row by csrc/."""

    by_kernel = False

    def forward(self, x: Tensor) -> Tensor:
        if not Linear.by_kernel or x.shape[:-1].numel() > 1:
            return super().forward(x)
        return all_dots(self.weight, x.view(1, -1).float()).to(x.dtype).view(*x.shape[:-1], -1)


class RoomyLayer(DynamicLayer):
    """A cache that is appended to in place; transformers' own copies everything in every step."""

    def fill(self, key: Tensor, value: Tensor) -> None:
        self.length = key.shape[2]
        self.buffers = [key, value]
        self._make_room()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.length == self.buffers[0].shape[2]:
            self._make_room()
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length] = new[:, :, 0]
        self.length += 1
        key, value = (buffer[:, :, : self.length] for buffer in self.buffers)
        return key, value

    def get_seq_length(self) -> int:
        return self.length

    def _make_room(self) -> None:
        self.buffers = [F.pad(buffer, (0, 0, 0, ROOM)) for buffer in self.buffers]


def built(config: NormfreeConfig, dtype: torch.dtype, embedding: Tensor) -> NormfreeForCausalLM:
    """The model with random weights on the device of ``embedding``, which several models share."""
    with torch.device("meta"):
        model: Any = NormfreeForCausalLM(config)
        model.to(dtype)
    replaced: dict[str, Tensor] = {
        name: (
            random_matrix(*weight.shape, dtype=dtype) if weight.dim() == 2 else torch.ones(weight.shape, dtype=dtype)
        ).to(embedding.device)
        for name, weight in model.named_parameters()
        if name != "model.embed_tokens.weight"
    }
    replaced |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    model.load_state_dict(replaced, assign=True)
    model.tie_weights()
    model.model.rotary_embedding = type(model.model.rotary_embedding)(config).to(embedding.device)
    for module in [model.lm_head, *model.modules()]:
        # the sparse decode has kernels of its own for the layers of a Spark network
        if type(module) in (nn.Linear, ResidualProjection) and module not in _spark_projections(model):
            module.__class__ = Linear
    return model.eval().requires_grad_(False)


def filled_cache(config: NormfreeConfig, n_token: int, dtype: torch.dtype, device: torch.device) -> DynamicCache:
    """A cache of random keys and values, with spare capacity."""
    cache = DynamicCache()
    for _ in range(config.n_layer):
        shape = (1, config.n_kv_head, n_token, config.head_dim)
        key, value = (50 * random_matrix(*shape, dtype=dtype).to(device) for _ in range(2))
        if config.attention == "spark":
            spark = SparkCacheLayer(config.spark_sizes.attention_predictor_dim)
            spark.append(key, value)
            cache.layers.append(spark)
        else:
            roomy = RoomyLayer()
            roomy.fill(key, value)
            cache.layers.append(roomy)
    return cache


def random_matrix(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normally distributed; large ones repeat a part of prime length, which is quick to make."""
    part = (torch.randn(1_000_003) * 0.02).to(dtype)
    n = torch.Size(shape).numel()
    return part.repeat(-(-n // part.numel()))[:n].view(shape)


def attention_by_kernel(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention of one query to every key, by the dense products of csrc/."""
    heads = []
    for q, k, v in zip(query[0].chunk(key.shape[1]), key[0], value[0], strict=True):
        weights = (all_dots(k, q[:, 0].float()) * module.scaling).softmax(-1)
        heads.append(weighted_rows(v, weights))
    return torch.cat(heads)[None, None].to(query.dtype), None


def _spark_projections(model: NormfreeForCausalLM) -> set[nn.Module]:
    networks = [module for module in model.modules() if isinstance(module, SparkFeedForward)]
    return {projection for network in networks for projection in network.children()}
