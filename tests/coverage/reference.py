"""What a model attends with, seen apart from Normfree: every softmax over keys that its eager attention computes.

The eager model runs under a dispatch mode that keeps the result of each softmax [batch, n_head, T, n_key], with the
module that was running. Where the model returns attention weights too, they have to be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

Batch = dict[str, Tensor]

_SOFTMAXES = {torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default}


@dataclass(frozen=True)
class Softmax:
    """One softmax over keys: the module that computed it, and its weights, float64 [batch, n_head, T, n_key].

    A learned sink is the last of the keys.
    """

    module: str
    weights: np.ndarray

    @property
    def entropy(self) -> np.ndarray:
        """Float64 [batch, n_head, T], nats; NaN for a query that attends to nothing."""
        p = self.weights
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        return np.where(np.isnan(p).any(-1) | (p.sum(-1) == 0), np.nan, entropy)


@dataclass(frozen=True)
class Seen:
    """One forward pass of the eager model.

    softmaxes: in the order they were computed.
    returned: the weights that ``output_attentions`` gave, those of layers without any left out.
    """

    softmaxes: list[Softmax]
    returned: list[np.ndarray]

    @property
    def by_module(self) -> dict[str, list[Softmax]]:
        """The softmaxes of each module, one over two halves of the values (DiffLlama) counted once."""
        found: dict[str, list[Softmax]] = {}
        for each in self.softmaxes:
            before = found.setdefault(each.module, [])
            if not before or not np.array_equal(before[-1].weights, each.weights):
                before.append(each)
        return found

    @property
    def are_returned(self) -> bool:
        """Whether the model returns the weights of its softmaxes, up to what learned sinks take."""
        return len(self.returned) == len(self.softmaxes) and all(
            returned.shape[:-1] == seen.weights.shape[:-1] and _agree(returned, seen.weights[..., : returned.shape[-1]])
            for returned, seen in zip(self.returned, self.softmaxes, strict=True)
        )


def _agree(returned: np.ndarray, weights: np.ndarray) -> bool:
    total = returned.sum(-1, keepdims=True)
    kept = weights.sum(-1, keepdims=True)
    whole = np.where(total > kept + 1e-6, weights / np.where(kept > 0, kept, 1), weights)
    return np.allclose(returned, np.where(kept > 0, whole, returned), rtol=0, atol=1e-6)


def see(model: PreTrainedModel, batch: Batch) -> Seen:
    """The softmaxes of a copy of ``model`` that attends eagerly, on a batch of sequences [batch, T]."""
    twin = eager_copy(model)
    with torch.no_grad(), _module_names(twin) as running, _Softmaxes(batch["input_ids"].shape, running) as seen:
        output = twin(**batch, output_attentions=True)
    return Seen(seen.found, [_numpy(each) for each in _tensors(output.get("attentions"))])


def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` whose parts all attend eagerly, those of a composed model too."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    if twin.config._attn_implementation != "eager":  # a class that chooses as it is built (Falcon)
        twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
        twin.load_state_dict(model.state_dict())
    return twin.eval()


class _Softmaxes(TorchDispatchMode):
    """Keeps every softmax over keys of queries [batch, T]."""

    def __init__(self, shape: torch.Size, running: list[str]) -> None:
        super().__init__()
        self.found: list[Softmax] = []
        self._batch, self._n_query = shape
        self._running = running
        self._kept: np.ndarray | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _SOFTMAXES and args[1] in (-1, result.ndim - 1):
            weights = result.detach()
            if weights.ndim == 3 and weights.shape[0] % self._batch == 0 and weights.shape[0] > self._batch:
                weights = weights.unflatten(0, (self._batch, -1))
            if weights.ndim == 4 and (weights.shape[0], weights.shape[2]) == (self._batch, self._n_query):
                self.found.append(Softmax(self._running[-1], self._with_sink(_numpy(weights))))
        elif function is torch.ops.aten.sigmoid.default and result.ndim == 3:
            self._kept = _numpy(result)
        return result

    def _with_sink(self, weights: np.ndarray) -> np.ndarray:
        """``weights``, times what a sink leaves of them where it is a scale of the output, and what it takes.

        Granite's scale, sigmoid(logsumexp of the scores - sink) [batch, n_head, T], comes just before the softmax.
        """
        kept, self._kept = self._kept, None
        if kept is None or kept.shape != weights.shape[:-1]:
            return weights
        return np.concatenate([weights * kept[..., None], 1 - kept[..., None]], -1)


@contextmanager
def _module_names(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, outermost first; layers without a name of their own are left out."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Softmax):
            continue

        def enter(*_: Any, name: str = name) -> None:
            running.append(name)

        def leave(*_: Any) -> None:
            running.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for each in nested:
            yield from _tensors(each)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()
