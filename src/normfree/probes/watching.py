"""The attention of one model while it runs: its layer, forward pass and first position.

All work of probes in a running model goes through :meth:`AttentionWatch._guarded`: an error there makes a layer
unreadable and never reaches the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from normfree.errors import InputError
from normfree.probes.expectation import asking_modules, called_attention, has_softmax
from normfree.probes.forward_passes import ForwardPass, ForwardPasses, is_backward
from normfree.probes.interception import InterfaceCall, SoftmaxCall, observe_attention
from normfree.probes.reading import UnreadableCallError
from normfree.probes.softmax import heads_of_scores

FORCE_EAGER = 'run this step under torch.compiler.set_stance("force_eager")'
COMPILED = f"it runs in code compiled by torch.compile, where the probe sees nothing; {FORCE_EAGER}"
NO_PASS = (
    "no forward pass of the model has been seen; code compiled by torch.compile shows none: if there is such code, "
    f"{FORCE_EAGER}"
)
NEVER_CALLED = (
    f"the forward passes seen have not called it; if it runs in code compiled by torch.compile, {FORCE_EAGER}"
)
NO_SOFTMAX = "it ran, and no softmax over keys was seen in it: it attends in another way, or in a kernel of its own"


class Row(NamedTuple):
    """The attention of a module by its softmax number ``repeat`` (from 0) in a forward pass."""

    repeat: int
    layer: int
    """Number of the module in the model's order."""


@dataclass(frozen=True)
class Attending:
    """One softmax over keys that a module has computed.

    start: position of the first query, from the first key that a cache was given; None if no cache was seen.
    """

    module: nn.Module
    call: InterfaceCall | SoftmaxCall
    start: int | None


class Reader(Protocol):
    """Receives an attention of ``row``; an exception makes the row unreadable."""

    def __call__(self, row: Row, attending: Attending) -> None: ...


class AttentionWatch:
    """Hands every attention of ``model`` to ``read`` while :meth:`watch` runs.

    Raises:
        InputError: nothing in the model attends.
    """

    def __init__(self, model: nn.Module, read: Reader) -> None:
        self._asking = asking_modules(model)
        self._called_attention = called_attention(model, self._asking)
        if not self._asking and not self._called_attention and not has_softmax(model):
            raise InputError(
                f"{type(model).__name__} has no attention module to probe; pass a transformers language model"
            )
        self._read = read
        named = dict(model.named_modules())
        self._names = list(named)
        self._modules = list(named.values())
        self._layer = {module: layer for layer, module in enumerate(self._modules)}
        self.passes = ForwardPasses(self._modules)
        self.reset()

    def reset(self) -> None:
        self.refused: dict[Row, str] = {}
        self._seen: set[Row] = set()
        self._ordered: tuple[int, list[Row]] | None = None
        self.passes.reset()

    @contextmanager
    def watch(self) -> Iterator[None]:
        with self.passes.watch(), observe_attention(self):
            yield

    @property
    def rows(self) -> list[Row]:
        """Rows seen or expected: all first softmaxes in the model's order, then all second ones."""
        if self._ordered is None or self._ordered[0] != len(self._seen):  # rows are never taken back
            self._ordered = len(self._seen), self._in_order()
        return self._ordered[1]

    def _in_order(self) -> list[Row]:
        seen = {self._modules[row.layer] for row in self._seen}
        inside = {inner for module in seen for inner in module.modules()}
        unseen = {
            module for module in self._called_attention - inside if not any(inner in seen for inner in module.modules())
        }
        return sorted(self._seen | {Row(0, self._layer[module]) for module in (self._asking | unseen)})

    def add(self, rows: set[Row]) -> None:
        """Rows that another process has seen."""
        self._seen |= rows

    def name(self, row: Row) -> str:
        name = self._names[row.layer]
        return name if row.repeat == 0 else f"{name} (call {row.repeat + 1})"

    def module(self, row: Row) -> nn.Module:
        return self._modules[row.layer]

    def why_unseen(self, row: Row) -> str:
        module = self._modules[row.layer]
        if self._is_compiled(module):
            return COMPILED
        if module in self.passes.called:
            return NO_SOFTMAX
        return NEVER_CALLED if self.passes.called else NO_PASS

    def _is_compiled(self, module: nn.Module) -> bool:
        around = (outer for outer in self._modules if any(inner is module for inner in outer.modules()))
        return any(
            type(each).__name__ == "OptimizedModule"
            or each._compiled_call_impl is not None
            or hasattr(each.forward, "_torchdynamo_orig_callable")
            for each in (*around, *module.modules())
        )

    def saw_interface_call(self, module: object, describe: Callable[[], InterfaceCall]) -> None:
        if isinstance(module, nn.Module) and module in self._layer and not is_backward():
            self._guarded(module, lambda running: self._saw(module, describe(), running))

    def saw_torch_call(self, describe: Callable[[], InterfaceCall | SoftmaxCall | None]) -> None:
        module = None if is_backward() else self.passes.innermost
        if module is not None:
            self._guarded(module, lambda running: self._saw_torch(module, describe(), running))

    def caches(self, cache: Cache, keys: Tensor, layer_idx: int) -> None:
        module = None if is_backward() else self.passes.innermost
        if module is not None:
            self._guarded(module, lambda _: self.passes.caches(cache, keys, layer_idx))

    def _guarded(self, module: nn.Module, work: Callable[[ForwardPass], None]) -> None:
        """The boundary between probe and model: an exception of ``work`` makes a row unreadable."""
        running = self.passes.current or ForwardPass()
        try:
            work(running)
        except Exception as error:
            row = Row(max(0, running.n_softmax[module] - 1), self._layer[module])
            lines = str(error).splitlines() or [""]
            is_reason = isinstance(error, (UnreadableCallError, InputError))
            reason = str(error) if is_reason else f"reading it failed with {type(error).__name__}: {lines[0]}"
            self._seen.add(row)
            self.refused[row] = reason

    def _saw_torch(self, module: nn.Module, call: InterfaceCall | SoftmaxCall | None, running: ForwardPass) -> None:
        if isinstance(call, InterfaceCall):
            self._saw(module, replace(call, module=module), running)
        elif call is not None:
            scores = heads_of_scores(call.scores, module)
            if scores is not None:
                self._saw(module, SoftmaxCall(scores), running)
            elif module in self._asking | self._called_attention and running.n_softmax[module] == 0:
                running.n_softmax[module] += 1
                raise UnreadableCallError(f"it computes a softmax over scores of shape {list(call.scores.shape)}")

    def _saw(self, module: nn.Module, call: InterfaceCall | SoftmaxCall, running: ForwardPass) -> None:
        computed_from = (call.scores,) if isinstance(call, SoftmaxCall) else (call.query, call.key)
        if running.is_latest(module, computed_from):
            return  # the same softmax, over other values
        running.latest = (module, *(weakref.ref(tensor) for tensor in computed_from))
        row = Row(running.n_softmax[module], self._layer[module])
        running.n_softmax[module] += 1
        self._seen.add(row)
        start = running.first_position(computed_from[0].shape[-2])
        running.n_cached_by_layer = None
        if row in self.refused:
            return
        _check_readable(call, running)
        self._read(row, Attending(module, call, start))


def _check_readable(call: InterfaceCall | SoftmaxCall, running: ForwardPass) -> None:
    tensor = call.scores if isinstance(call, SoftmaxCall) else call.query
    if tensor.device.type == "meta":
        raise UnreadableCallError("it is on the meta device, where tensors have no numbers")
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnreadableCallError("its CUDA graph is being captured, which reading would break")
    if tensor.dim() != 4 or not running.token_lengths:
        return
    n_head, n_query = tensor.shape[1:3]
    if n_query in running.token_lengths:
        return
    if not isinstance(call, SoftmaxCall):
        if n_head in running.token_lengths:
            raise UnreadableCallError("its queries are not tokens: each token attends to something of its own")
    elif n_query not in running.token_batches:
        raise UnreadableCallError(f"its {n_query} queries are not the tokens of the forward pass")
