"""How sparse the layers of a decoder are: neurons that are not zero, keys that are attended to."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from normfree.modeling import activation_kernels
from normfree.modeling.attention import SparkAttention
from normfree.modeling.decoder import NormfreeForCausalLM
from normfree.probes.attached import Attached


@dataclass
class _Mean:
    total: float = 0.0
    n: int = 0

    def add(self, total: float, n: int) -> None:
        self.total += total
        self.n += n


class SparsityProbe(Attached):
    """Sums over the batches seen while attached, for every layer of one of our models.

    It attaches itself when it is made and leaves with :meth:`close` or at the end of a ``with`` block::

        with SparsityProbe(model) as probe:
            for batch in batches:
                model(batch)
        probe.by_layer()

    Neurons are read where they enter the last projection of the feed-forward network, whatever its kind: of a plain
    ReLU network this is its natural sparsity, of GELU about 1. Every position counts, so sequences must not be padded.
    Recomputation under gradient checkpointing is not counted again. A NaN or infinite neuron makes its layer NaN.
    """

    def __init__(self, model: NormfreeForCausalLM) -> None:
        blocks = model.model.blocks
        self._neurons, self._keys = ([_Mean() for _ in blocks] for _ in range(2))
        self.has_sparse_attention = any(isinstance(block.attention, SparkAttention) for block in blocks)
        self._tracker = ModuleTracker()
        self._attached = ExitStack()
        for layer, block in enumerate(blocks):
            hook = block.ffn.down_proj.register_forward_pre_hook(self._neuron_reader(layer))
            self._attached.callback(hook.remove)
            if isinstance(block.attention, SparkAttention):
                hook = block.attention.register_forward_hook(self._key_reader(layer))
                self._attached.callback(hook.remove)

    def close(self) -> None:
        """Takes the probe off the model; what it has seen stays."""
        self._attached.close()

    def active_share(self) -> Tensor:
        """Share of the n_inner neurons that are not zero, over all tokens: float64 [n_layer]; NaN if none was seen."""
        return _means(self._neurons)

    def attended_keys(self) -> Tensor:
        """Mean number of keys with a weight above zero, over queries and heads of sparse attention: float64 [n_layer].

        NaN for softmax attention, whose weights are all above zero.
        """
        return _means(self._keys)

    def by_layer(self) -> dict[str, Tensor]:
        """``active_share``, and ``attended_keys`` for a model with sparse attention, each [n_layer]."""
        keys = {"attended_keys": self.attended_keys()} if self.has_sparse_attention else {}
        return {"active_share": self.active_share(), **keys}

    def reduce(self) -> None:
        """Adds up the processes of a distributed run; call it in each of them, once, before reading."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
        means = (*self._neurons, *self._keys)
        sums = torch.tensor([[each.total, each.n] for each in means], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        for mean, (total, n) in zip(means, sums.tolist(), strict=True):
            mean.total, mean.n = total, int(n)

    def _neuron_reader(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        @torch.no_grad()
        def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._tracker.is_bw:
                return
            (neurons,) = inputs
            self._neurons[layer].add(_count_nonzero(neurons), neurons.numel())

        return read

    def _key_reader(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], tuple[Tensor, Tensor]], None]:
        @torch.no_grad()
        def read(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            if self._tracker.is_bw:
                return
            weights = output[1]
            total = (weights > 0).sum() + (weights * 0).sum(dtype=torch.float64)
            self._keys[layer].add(float(total), weights[..., 0].numel())

        return read


def _means(means: list[_Mean]) -> Tensor:
    return torch.tensor([each.total / each.n if each.n else math.nan for each in means], dtype=torch.float64)


def _count_nonzero(x: Tensor) -> float:
    """NaN where an entry is not finite."""
    if activation_kernels.kernels_take(x):
        count = activation_kernels.count_nonzero(x)
        return math.nan if count is None else count
    # A number that is not finite makes the sum so, and its product with zero NaN. Finite numbers must not: the range of
    # float16 is too small for a sum of them.
    total = x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None)
    return float(x.count_nonzero() + 0 * total.float())
