"""The running module of a model and its forward pass, by torch's global module hooks: none are on the model."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

# Hooks should fire for the compiled model too: that it was called is recorded.
warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")


@dataclass(eq=False)
class ForwardPass:
    """One call of the outermost transformers model, or of the outermost module where there is none."""

    n_softmax: Counter[nn.Module] = field(default_factory=Counter)
    """Softmaxes over keys seen so far, by the module that computed them."""
    token_lengths: set[int] = field(default_factory=set)
    """T of the token ids [batch, T] that modules took; empty if none were seen."""
    token_batches: set[int] = field(default_factory=set)
    """Their batch; T where ids are [T, batch], as in XLNet."""
    n_cached: int | None = None
    """Keys in the cache when the pass first added to it; None before."""
    n_new: int = 0
    """Keys added then."""
    n_cached_by_layer: int | None = None
    """Keys in the cache of the layer that added last, until it has attended."""
    latest: tuple[Any, ...] = ()
    """The module of the latest softmax, and what it was computed from."""

    def is_latest(self, module: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
        """True if ``module`` computed the latest softmax from these very tensors."""
        if not self.latest or self.latest[0] is not module or len(self.latest) != 1 + len(tensors):
            return False
        return all(old() is new for old, new in zip(self.latest[1:], tensors, strict=True))

    def first_position(self, n_query: int) -> int | None:
        """Position of the first of ``n_query`` queries that attend now; None if no cache was seen.

        A layer without keys of its own may attend from the last tokens alone (Gemma 4).
        """
        if self.n_cached_by_layer is not None:
            return self.n_cached_by_layer
        return None if self.n_cached is None else self.n_cached + max(0, self.n_new - n_query)


class ForwardPasses:
    """Stack of running modules of one model, per thread, kept while the block of ``watch`` runs."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        # of a pass's many calls, those of torch's elementary modules tell nothing, but for the ids that embeddings take
        self._modules = {module for module in modules if not _is_elementary(module)}
        self._local = threading.local()
        self._ends: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self.reset()

    def reset(self) -> None:
        self.called: set[nn.Module] = set()
        self.n_interrupted = 0
        """Passes that ended in an exception."""
        self.n_taken_back = 0
        """Tokens taken out of caches after a pass had seen them, summed over sequences."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._local = threading.local()
        with module_calls(self._enter, self._leave):
            yield

    @property
    def current(self) -> ForwardPass | None:
        frames = self._frames
        return frames[-1][1] if frames else None

    @property
    def innermost(self) -> nn.Module | None:
        """The innermost running module that is not one of torch's elementary ones."""
        for module, _ in reversed(self._frames):
            if not type(module).__module__.startswith("torch.nn.modules") or isinstance(module, nn.MultiheadAttention):
                return module
        return None

    def caches(self, cache: Cache, keys: Tensor, layer_idx: int) -> None:
        """Called before ``keys`` [batch, heads, n, dim] enter layer ``layer_idx`` of ``cache``."""
        running = self.current
        if running is None:
            return
        n_cached = int(cache.get_seq_length(layer_idx))
        running.n_cached_by_layer = n_cached
        if running.n_cached is None:
            running.n_cached, running.n_new = n_cached, keys.shape[-2]
            if n_cached > 0:
                self.n_taken_back += keys.shape[0] * max(0, self._ends.get(cache, 0) - n_cached)
            self._ends[cache] = n_cached + keys.shape[-2]

    @property
    def _frames(self) -> list[tuple[nn.Module, ForwardPass]]:
        frames: list[tuple[nn.Module, ForwardPass]] | None = getattr(self._local, "frames", None)
        if frames is None:
            frames = self._local.frames = []
        return frames

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or module not in self._modules or is_backward():
            return
        frames = self._frames
        self._drop(module)  # a KeyboardInterrupt skips hooks and leaves it behind
        is_model = isinstance(module, PreTrainedModel)
        if not frames or (is_model and not any(isinstance(outer, PreTrainedModel) for outer, _ in frames)):
            running = ForwardPass()
        else:
            running = frames[-1][1]
        frames.append((module, running))
        self.called.add(module)
        for ids in args if isinstance(args, tuple) else ():
            if isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in (torch.int64, torch.int32):
                running.token_batches.add(ids.shape[0])
                running.token_lengths.add(ids.shape[1])

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or module not in self._modules or is_backward():
            return
        running = self.current
        self._drop(module)
        if result is None and running is not None and self.current is not running:
            self.n_interrupted += 1

    def _drop(self, module: nn.Module) -> None:
        frames = self._frames
        depth = next((depth for depth, (outer, _) in enumerate(frames) if outer is module), None)
        if depth is not None:
            del frames[depth:]


def _is_elementary(module: nn.Module) -> bool:
    is_torchs = type(module).__module__.startswith("torch.nn.modules")
    return is_torchs and not module._modules and not isinstance(module, nn.Embedding)


@contextmanager
def module_calls(
    enter: Callable[[nn.Module, Any], None], leave: Callable[[nn.Module, Any, Any], None]
) -> Iterator[None]:
    """Calls ``enter`` before and ``leave`` after every call of a module, also after one that raised."""
    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def is_backward() -> bool:
    """True while autograd runs a backward pass, where gradient checkpointing calls modules again."""
    return torch._C._current_graph_task_id() != -1
