"""Sparsity of a decoder's layers: neurons that are not zero, keys that are attended to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from normfree.columns import ACTIVE_SHARE, ATTENDED_KEYS
from normfree.modeling import activation_kernels
from normfree.modeling.attention import SparkAttention
from normfree.modeling.decoder import NormfreeForCausalLM
from normfree.probes.probe import LayerRow, Probe, read_calls, rows_by_layer


@dataclass
class _Mean:
    total: float = 0.0
    n: int = 0

    def add(self, total: float, n: int) -> None:
        self.total += total
        self.n += n


class SparsityProbe(Probe):
    """Active neurons and attended keys of every layer of a Normfree model, over the batches seen while attached. ::

        with SparsityProbe(model) as probe:
            for batch in batches:
                model(batch)
        probe.by_layer()

    Neurons are read where they enter the last projection of the feed-forward network: for a plain ReLU network this is
    its natural sparsity, for GELU about 1. Every position counts, so sequences must not be padded. A NaN or infinite
    neuron makes its layer NaN.
    """

    def __init__(self, model: NormfreeForCausalLM) -> None:
        self._blocks = model.model.blocks
        self.has_sparse_attention = any(isinstance(block.attention, SparkAttention) for block in self._blocks)
        self.reset()

    def reset(self) -> None:
        self._neurons, self._keys = ([_Mean() for _ in self._blocks] for _ in range(2))

    def active_share(self) -> Tensor:
        """Share of the n_inner neurons that are not zero, over all tokens: float64 [n_layer]; NaN if none was seen."""
        return _means(self._neurons)

    def attended_keys(self) -> Tensor:
        """Mean number of keys with a weight above zero, over queries and heads of sparse attention: float64 [n_layer].

        NaN for softmax attention.
        """
        return _means(self._keys)

    def by_layer(self) -> dict[str, Tensor]:
        """``active_share``, and ``attended_keys`` for a model with sparse attention, each [n_layer]."""
        keys = {ATTENDED_KEYS: self.attended_keys()} if self.has_sparse_attention else {}
        return {ACTIVE_SHARE: self.active_share(), **keys}

    def layer_rows(self) -> Iterator[LayerRow]:
        return rows_by_layer(self.by_layer())

    def _attach(self, stack: ExitStack) -> None:
        for layer, block in enumerate(self._blocks):
            read_calls(stack, block.ffn.down_proj, partial(self._read_neurons, layer))
            if isinstance(block.attention, SparkAttention):
                read_calls(stack, block.attention, partial(self._read_keys, layer))

    def _reduce(self) -> None:
        device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
        means = (*self._neurons, *self._keys)
        sums = torch.tensor([[each.total, each.n] for each in means], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        for mean, (total, n) in zip(means, sums.tolist(), strict=True):
            mean.total, mean.n = total, int(n)

    def _read_neurons(self, layer: int, inputs: tuple[Tensor], output: Tensor) -> None:
        (neurons,) = inputs
        self._neurons[layer].add(_count_nonzero(neurons), neurons.numel())

    def _read_keys(self, layer: int, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1]
        total = (weights > 0).sum() + (weights * 0).sum(dtype=torch.float64)
        self._keys[layer].add(float(total), weights[..., 0].numel())


def _means(means: list[_Mean]) -> Tensor:
    return torch.tensor([each.total / each.n if each.n else math.nan for each in means], dtype=torch.float64)


def _count_nonzero(x: Tensor) -> float:
    """NaN where an entry is not finite."""
    if activation_kernels.kernels_take(x):
        count = activation_kernels.count_nonzero(x)
        return math.nan if count is None else count
    # A number that is not finite makes the sum so, and its product with zero NaN. Sums of finite float16 numbers can
    # overflow, so they are taken in float32.
    total = x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None)
    return float(x.count_nonzero() + 0 * total.float())
