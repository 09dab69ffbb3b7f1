"""The attention entropy of every head of a transformers model, while it trains, evaluates or generates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker
from transformers.cache_utils import Cache

from normfree.entropy.fused import BACKENDS, attention_entropy_and_sink
from normfree.entropy.nonfinite import count_nonfinite
from normfree.entropy.reference import read_weights
from normfree.entropy.visibility import Visibility, visibility_of
from normfree.errors import InputError, unknown_name
from normfree.probes.interception import InterfaceCall, observe_attention
from normfree.probes.reading import Attention, UnreadableCallError, read_call
from normfree.probes.statistics import LayerStatistics, Queries

NEVER_CALLED = "it has made no call through transformers' attention interface"


@dataclass(frozen=True)
class _KnownMask:
    """What a mask, or none, was found to say of calls of one kind. It is held, so that no other can take its place in
    memory.
    """

    mask: Tensor | None
    version: int
    kind: tuple[Any, ...]
    visibility: Visibility
    queries: Queries

    def is_same(self, mask: Tensor | None, kind: tuple[Any, ...]) -> bool:
        if self.kind != kind:
            return False
        if self.mask is None or mask is None:
            return self.mask is mask
        return self.mask.is_set_to(mask) and self.version == mask._version


class EntropyProbe:
    """Context manager: while active, every forward pass of ``model`` adds to statistics of its attention.

    Entropies are those of ReLU's Revival, Eq. 8, without its ε: in nats, the mean over the queries of all
    sequences seen. ::

        with EntropyProbe(model) as probe:
            for batch in batches:
                model(**batch)
        probe.per_head()

    The probe reads queries, keys and mask from transformers' attention interface and leaves the call as it
    is: outputs, gradients and random numbers of the model are the same, bit for bit. It works in training
    (recomputation under gradient checkpointing is not counted again), under autocast and with a KV cache,
    where each call adds its queries. Entropy is that of the softmax, before attention dropout.

    - Layers: all attention modules of the model, in the model's order; ``layers`` names them. What cannot be
      read is in ``unreadable``, and its row in every result is NaN (0 in counts).
    - Padding: a query that cannot see its own key is padding and is left out, on whichever side the padding
      is.
    - NaN: a query with NaN entropy (a NaN or infinite score) makes the mean it belongs to NaN; ``nan_rows``
      counts.
    - Positions count from 0 at the first key of the sequence as the model has it, left padding included,
      through a KV cache too.
    - Statistics stay after the exit and go on at the next entry; ``reset`` clears them.
    - Code compiled by ``torch.compile`` does not pass through here: run the probed step under
      ``torch.compiler.set_stance("force_eager")``, or its layers are named in ``unreadable``.

    Args:
        model: any module that contains a transformers model, wrapped (DDP, PEFT) or not.
        count_nonfinite: also count NaN and infinite attention scores, as
            :func:`normfree.entropy.count_nonfinite_scores` does.
        backend: as in :func:`normfree.entropy.attention_entropy`; "auto" also reads the weights that an eager attention
            function hands back in float32.

    Raises:
        InputError: the model has no attention module, or the backend is unknown.
    """

    def __init__(self, model: nn.Module, *, count_nonfinite: bool = False, backend: str = "auto") -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise unknown_name("entropy backend", backend, ["auto", *BACKENDS])
        self._layers = attention_modules(model)
        self._count_nonfinite = count_nonfinite
        self._backend = backend
        self._index = {module: row for row, module in enumerate(self._layers.values())}
        self._modules = {module: name for name, module in model.named_modules()}
        self._tracker = ModuleTracker()
        self._active: ExitStack | None = None
        self._mask: _KnownMask | None = None
        self.reset()

    def __enter__(self) -> Self:
        if self._active is not None:
            raise InputError("this EntropyProbe is already active; leave it before entering it again")
        with ExitStack() as stack:
            for module in self._layers.values():
                handle = module.register_forward_pre_hook(self._note_cache_length, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(observe_attention(self._observe))
            self._active = stack.pop_all()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._active is not None
        self._active.close()
        self._active = None
        self._mask = None

    def reset(self) -> None:
        """Forget everything seen."""
        self._statistics: dict[int, LayerStatistics] = {}
        self._refused: dict[int, str] = {}
        self._cached: dict[nn.Module, int] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the attention modules: the first dim of every result."""
        return tuple(self._layers)

    @property
    def unreadable(self) -> dict[str, str]:
        """The attention modules that could not be read since the last ``reset``, and why."""
        reasons = {}
        for row, name in enumerate(self._layers):
            if row in self._refused:
                reasons[name] = self._refused[row]
            elif row not in self._statistics:
                reasons[name] = NEVER_CALLED
        return reasons

    def per_head(self) -> Tensor:
        """Mean entropy over all queries, float32 [n_layer, n_head], nats; NaN for a head with any NaN
        query.
        """
        return self._mean_entropy().float()

    def per_position(self) -> Tensor:
        """Mean entropy of the queries at each position, float32 [n_layer, n_head, T], nats.

        NaN where a query of that head and position was NaN, and where no query was seen.
        """
        n_position = max((each.n_position for each in self._readable().values()), default=0)

        def means(layer: LayerStatistics) -> Tensor:
            mean = (layer.entropy / layer.rows).masked_fill(layer.nan_rows > 0, torch.nan)
            return torch.nn.functional.pad(mean, (0, n_position - layer.n_position), value=torch.nan)

        return self._stack(means).float()

    def maximum(self) -> Tensor:
        """Mean of ln(number of visible keys) over the same queries: the largest that ``per_head`` could be.

        float32 [n_layer, n_head], nats. A learned sink counts as one more key.
        """
        return self._mean_bound().float()

    def normalized(self) -> Tensor:
        """``per_head`` over ``maximum``: float32 [n_layer, n_head], 1 for uniform attention.

        NaN also where every query sees one key only.
        """
        return (self._mean_entropy() / self._mean_bound()).float()

    def sink_share(self) -> Tensor:
        """Mean attention paid to the first key of the sequence, float32 [n_layer, n_head].

        Over the queries of calls that start a sequence; queries that a KV cache continues are left out. The
        first key is the first that is not padding. NaN for a head with any NaN query.
        """
        share = self._stack(lambda layer: layer.sink / layer.sink_rows)
        return share.masked_fill(self.nan_rows() > 0, torch.nan).float()

    def rows(self) -> Tensor:
        """Queries seen, NaN ones included: int64 [n_layer, n_head]."""
        return self._stack(lambda layer: layer.rows.sum().expand(layer.n_head), empty=0)

    def nan_rows(self) -> Tensor:
        """Queries with NaN entropy: int64 [n_layer, n_head]."""
        return self._stack(lambda layer: layer.nan_rows.sum(-1), empty=0)

    def nonfinite(self) -> tuple[Tensor, Tensor]:
        """``(nan, inf)``: the numbers of NaN and of infinite attention scores, each int64 [n_layer, n_head].

        Raises:
            InputError: the probe was made without ``count_nonfinite=True``.
        """
        if not self._count_nonfinite:
            raise InputError("non-finite scores were not counted; make the probe with count_nonfinite=True")
        nan = self._stack(lambda layer: layer.nan_scores, empty=0)
        return nan, self._stack(lambda layer: layer.inf_scores, empty=0)

    def reduce(self) -> None:
        """Sum the statistics over all processes of torch.distributed, in place; a no-op outside of it.

        Call it in every process, once, before reading; ``reset`` before going on.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        for row, module in enumerate(self._layers.values()):
            layer = self._statistics.get(row)
            device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
            size = [layer.n_head, layer.n_position] if layer is not None else [0, 0]
            sizes = torch.tensor(size, device=device)
            torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
            n_head, n_position = sizes.tolist()
            if n_head == 0:
                continue
            layer = self._statistics.setdefault(row, LayerStatistics.zeros(n_head, n_position, device))
            layer.grow(n_position)
            layer.all_reduce()

    def _note_cache_length(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                self._cached[module] = int(value.get_seq_length(getattr(module, "layer_idx", 0)))

    def _observe(self, call: InterfaceCall) -> None:
        n_cached = self._cached.pop(call.module, None)
        if call.module not in self._modules or self._tracker.is_bw:
            return
        if call.module not in self._index:
            self._index[call.module] = len(self._layers)
            self._layers[self._modules[call.module]] = call.module
        row = self._index[call.module]
        with torch.no_grad():
            try:
                attention = read_call(call)
                self._record(row, attention, n_cached, is_causal=getattr(call.module, "is_causal", True))
            except (UnreadableCallError, InputError) as reason:
                self._refused[row] = str(reason)

    def _record(self, row: int, attention: Attention, n_cached: int | None, *, is_causal: bool) -> None:
        q, k = attention.q, attention.k
        # without a transformers cache in sight the queries are the last positions of the keys'
        start = max(0, k.shape[2] - q.shape[2]) if n_cached is None else n_cached
        visibility, queries = self._visible_to(attention, start, is_causal=is_causal)
        read = None
        if attention.weights is not None and self._backend == "auto":
            read = read_weights(attention.weights, visibility)
        if attention.selects and read is None:
            raise UnreadableCallError("it attends to selected keys, and handed back no float32 distribution over them")
        if read is not None:
            entropy, share = read.entropy, read.sink_share
        else:
            entropy, share = attention_entropy_and_sink(
                q,
                k,
                attention.scale,
                visibility,
                self._backend,
                softcap=attention.softcap,
                sinks=attention.sinks,
            )
        if row not in self._statistics:
            self._statistics[row] = LayerStatistics.zeros(q.shape[1], start + q.shape[2], q.device)
        layer = self._statistics[row]
        layer.add(queries, entropy, share if start == 0 else None)
        # a soft-cap makes finite scores of infinite ones
        known_finite = read is not None and read.all_scores_finite and attention.softcap is None
        if self._count_nonfinite and not known_finite:
            layer.add_nonfinite(count_nonfinite(q, k, attention.scale, visibility))

    def _visible_to(self, attention: Attention, start: int, *, is_causal: bool) -> tuple[Visibility, Queries]:
        """The visible keys of a call and its queries, the first of them at position ``start``.

        A model gives its layers one mask, which is looked at once; biases are each layer's own.
        """
        visibility, queries = self._masked_for(attention, start, is_causal=is_causal)
        if attention.bias is None:
            return visibility, queries
        biased = visibility.with_bias(attention.bias)
        if biased.allowed is not visibility.allowed:
            queries = _queries_of(biased, start, attention, is_causal=is_causal)
        return biased, queries

    def _masked_for(self, attention: Attention, start: int, *, is_causal: bool) -> tuple[Visibility, Queries]:
        mask, q, k = attention.attention_mask, attention.q, attention.k
        has_sinks = attention.sinks is not None
        kind = (q.shape, k.shape, q.device, attention.is_causal, attention.sliding_window, start, is_causal, has_sinks)
        if self._mask is not None and self._mask.is_same(mask, kind):
            return self._mask.visibility, self._mask.queries
        visibility = visibility_of(
            q,
            k,
            is_causal=attention.is_causal,
            attention_mask=mask,
            sliding_window=attention.sliding_window,
        )
        queries = _queries_of(visibility, start, attention, is_causal=is_causal)
        # tensors of inference mode do not say whether they have been written to
        if mask is None or not mask.is_inference():
            version = 0 if mask is None else mask._version
            self._mask = _KnownMask(mask, version, kind, visibility, queries)
        return visibility, queries

    def _mean_entropy(self) -> Tensor:
        mean = self._stack(lambda layer: layer.entropy.sum(-1)) / self.rows()
        return mean.masked_fill(self.nan_rows() > 0, torch.nan)

    def _mean_bound(self) -> Tensor:
        return self._stack(lambda layer: layer.bound.sum(-1)) / self.rows()

    def _readable(self) -> dict[int, LayerStatistics]:
        return {row: each for row, each in self._statistics.items() if row not in self._refused}

    def _stack(self, result: Callable[[LayerStatistics], Tensor], empty: float = torch.nan) -> Tensor:
        """One result a layer, stacked on the CPU; layers that were not read are filled with ``empty``."""
        results = {row: result(layer).cpu() for row, layer in self._readable().items()}
        if not results:
            reasons = "; ".join(sorted(set(self.unreadable.values())))
            raise InputError(f"no attention layer of the model has been read: {reasons}")
        shapes = {each.shape for each in results.values()}
        if len(shapes) > 1:
            raise InputError("the layers of this model differ in their number of heads: no common table of heads")
        missing = torch.full_like(next(iter(results.values())), empty)
        return torch.stack([results.get(row, missing) for row in range(len(self._layers))])


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that are called attention, by name: those that are expected to attend.

    Raises:
        InputError: there is none.
    """
    named = {name: module for name, module in model.named_modules() if "Attention" in type(module).__name__}
    if not named:
        raise InputError(f"{type(model).__name__} has no attention module to probe; pass a transformers language model")
    return {
        name: module
        for name, module in named.items()
        if not any(inner is not module and inner in named.values() for inner in module.modules())
    }


def _queries_of(visibility: Visibility, start: int, attention: Attention, *, is_causal: bool) -> Queries:
    valid = _valid_queries(visibility, start, attention.q.shape[0], is_causal=is_causal)
    return Queries(start, valid, visibility.counts + (attention.sinks is not None))


def _valid_queries(visibility: Visibility, start: int, batch: int, *, is_causal: bool) -> Tensor:
    """Bool [batch, n_query]: the queries that are no padding, because they see their own key.

    ``start`` is the position of the first query. Where a cache has dropped old keys, or never had them, the
    queries' own keys are the last ones. A cross-attention query has no own key, and is valid if it sees any.
    """
    n_query, n_key = visibility.n_query, visibility.n_key
    if visibility.allowed is None:
        return torch.ones(batch, n_query, dtype=torch.bool, device=visibility.device)
    if not is_causal and n_query != n_key:
        return (visibility.counts > 0).any(1).expand(batch, n_query)
    own_key = torch.arange(n_query, device=visibility.device) + min(start, n_key - n_query)
    allowed = visibility.allowed
    index = own_key[None, None, :, None].expand(*allowed.shape[:2], -1, 1)
    if allowed.shape[2] == 1:
        sees_own = allowed[:, :, 0].gather(-1, index[..., 0])
    else:
        sees_own = allowed.gather(-1, index)[..., 0]
    return sees_own.any(1).expand(batch, n_query)
