"""A KV cache that stores the two parts of a Spark key separately: the predictor's part is read as one stream."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from normfree.errors import InputError

SPARE_TOKENS = 256
"""Least spare capacity in tokens that a full buffer grows by."""


class SparkCacheLayer(CacheLayerMixin):
    """The cache of one Spark attention: buffers that grow by a quarter and are appended to in place.

    transformers' ``update`` joins the two parts and returns all keys and values [batch, n_kv_head, T, head_dim]. The
    sparse decode appends with :meth:`append` and reads the parts.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, predictor_dim: int) -> None:
        super().__init__()
        self.predictor_dim = predictor_dim
        self.length = 0
        self.buffers: list[torch.Tensor] = []

    @property
    def predictor_keys(self) -> torch.Tensor:
        """The first r dimensions of the keys so far, [batch, n_kv_head, T, r]: a view."""
        return self.buffers[0][:, :, : self.length]

    @property
    def rest_keys(self) -> torch.Tensor:
        """The other dimensions, [batch, n_kv_head, T, head_dim − r]: a view."""
        return self.buffers[1][:, :, : self.length]

    @property
    def stored_values(self) -> torch.Tensor:
        """[batch, n_kv_head, T, head_dim]: a view."""
        return self.buffers[2][:, :, : self.length]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = [part[:, :, :0] for part in self._parts(key_states, value_states)]
        self.is_initialized = True

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values [batch, n_kv_head, n, head_dim] of the next n tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        n_token = self.length + key.shape[2]
        if n_token > self.buffers[0].shape[2]:
            self._grow(n_token + max(SPARE_TOKENS, n_token // 4))
        for buffer, part in zip(self.buffers, self._parts(key, value), strict=True):
            buffer[:, :, self.length : n_token] = part
        self.length = n_token

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        was_empty = self.length == 0
        self.append(key_states, value_states)
        if was_empty:
            return key_states, value_states
        return torch.cat([self.predictor_keys, self.rest_keys], dim=-1), self.stored_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.buffers, self.length, self.is_initialized = [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def offload(self) -> None:
        raise InputError("a cache of the sparse decode cannot be offloaded; leave cache_implementation out")

    prefetch = offload

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self.buffers]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer[indices.to(buffer.device)] for buffer in self.buffers]

    def _parts(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return key[..., : self.predictor_dim], key[..., self.predictor_dim :], value

    def _grow(self, capacity: int) -> None:
        for i, buffer in enumerate(self.buffers):
            batch, n_kv_head, _, dim = buffer.shape
            larger = buffer.new_empty((batch, n_kv_head, capacity, dim))
            larger[:, :, : self.length] = buffer[:, :, : self.length]
            self.buffers[i] = larger


def spark_layer(cache: Cache, layer: int, predictor_dim: int) -> SparkCacheLayer:
    """Layer ``layer`` of ``cache`` as a :class:`SparkCacheLayer`, which replaces a dynamic layer and keeps its tokens.

    Raises:
        InputError: the layer is of another kind (static, quantized, offloaded).
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, SparkCacheLayer):
        return found
    if type(found) is not DynamicLayer or cache.offloading:
        raise InputError(
            f"the sparse decode cannot use a cache of {type(found).__name__}{', offloaded' * cache.offloading}; "
            "leave cache_implementation out, or give a DynamicCache"
        )
    spark = SparkCacheLayer(predictor_dim)
    if found.keys is not None and found.keys.numel():
        assert found.values is not None
        spark.append(found.keys, found.values)
    cache.layers[layer] = spark
    return spark
