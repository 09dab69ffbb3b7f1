"""Observes the attention that models compute, and the growth of their caches, without changing either.

Models ask ``ALL_ATTENTION_FUNCTIONS.get_interface(name, eager function of the module)`` for the function that they call
with query, key, value and mask. While observed, they get that function in a wrapper that reports each call afterwards.
An implementation name of Normfree's own would change what some models compute: they branch on names.

Models older than the interface call torch's softmax or ``scaled_dot_product_attention``, which are wrapped likewise;
calls from inside an interface function are not reported.

Nothing is attached to a model: it can be copied, pickled and saved while it is observed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface


@dataclass(frozen=True)
class InterfaceCall:
    """One call of an attention function, as the model made it.

    function: transformers' or the model's own.
    is_eager: it is the eager one of the model's module.
    weights: returned with the output: attention weights of eager functions, None from most others.
    n_positional: arguments passed by place after the mask.
    others: the remaining keyword arguments.
    """

    function: Callable[..., Any]
    is_eager: bool
    module: nn.Module
    query: Tensor
    key: Tensor
    attention_mask: Any
    weights: Any
    n_positional: int
    others: dict[str, Any]


@dataclass(frozen=True)
class SoftmaxCall:
    """A softmax over the last dim of ``scores``."""

    scores: Tensor


class Observer(Protocol):
    """Receives reports, in the thread that computes. No method may raise."""

    def saw_interface_call(self, module: object, describe: Callable[[], InterfaceCall]) -> None:
        """Called after an attention function that ``module`` called; ``describe`` may raise."""

    def saw_torch_call(self, describe: Callable[[], InterfaceCall | SoftmaxCall | None]) -> None:
        """Called after a softmax or ``scaled_dot_product_attention``; ``describe`` may raise; None is neither.

        The described call has ``NO_MODULE``: torch does not know which module called it.
        """

    def caches(self, cache: Cache, keys: Tensor, layer_idx: int) -> None:
        """Called before ``keys`` enter layer ``layer_idx`` of the cache."""


TORCH_SDPA: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
"""The ``function`` of a call of torch's own ``scaled_dot_product_attention``."""

NO_MODULE = nn.Module()
"""Placeholder for the module of a call that torch alone sees."""

_observers: list[Observer] = []
_replaced = ExitStack()
_get_interface = AttentionInterface.get_interface
_local = threading.local()


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Reports the attention of every model in this process to ``observer``; observers may nest in any order.

    What ``torch.compile`` traces or has compiled is not reported.
    """
    if not _observers:
        _replace_functions()
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
        if not _observers:
            _replaced.close()


def _replace_functions() -> None:
    functional: Any = nn.functional
    _replace(AttentionInterface, "get_interface", _get_observed_interface)
    _replace(Cache, "update", _observed_update(Cache.update))
    _replace(functional, "scaled_dot_product_attention", _observed_sdpa)
    for owner in (torch, torch.Tensor, functional):
        _replace(owner, "softmax", _observed_softmax(owner.softmax))


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    if name in vars(owner):
        _replaced.callback(setattr, owner, name, vars(owner)[name])
    else:
        _replaced.callback(delattr, owner, name)
    setattr(owner, name, function)


@contextmanager
def _unreported() -> Iterator[None]:
    """Calls of torch's functions inside are parts of a larger call."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


def _is_reported() -> bool:
    return not torch.compiler.is_compiling() and getattr(_local, "depth", 0) == 0


def _get_observed_interface(
    interface: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
) -> Callable[..., Any]:
    function: Callable[..., Any] = _get_interface(interface, attn_implementation, default)

    @wraps(function)
    def observed(*args: Any, **kwargs: Any) -> Any:
        if not _is_reported():
            return function(*args, **kwargs)
        with _unreported():
            result = function(*args, **kwargs)
            module = args[0] if args else kwargs.get("module")
            for observer in tuple(_observers):
                observer.saw_interface_call(
                    module, lambda: _describe(function, function is default, args, kwargs, result)
                )
        return result

    return observed


def _describe(
    function: Callable[..., Any], is_eager: bool, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> InterfaceCall:
    module, query, key, mask, n_positional, others = _given(*args, **kwargs)
    return InterfaceCall(
        function=function,
        is_eager=is_eager,
        module=module,
        query=query,
        key=key,
        attention_mask=mask,
        weights=result[1] if isinstance(result, tuple) and len(result) > 1 else None,
        n_positional=n_positional,
        others=others,
    )


def _given(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> tuple[Any, Any, Any, Any, int, dict[str, Any]]:
    """The arguments of an attention function, which has this signature."""
    return module, query, key, attention_mask, len(args), kwargs


def _observed_softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        if not _is_reported():
            return function(*args, **kwargs)
        with _unreported():
            result = function(*args, **kwargs)
            for observer in tuple(_observers):
                observer.saw_torch_call(lambda: _describe_softmax(args, kwargs))
        return result

    return softmax


def _describe_softmax(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SoftmaxCall | None:
    scores = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return SoftmaxCall(scores) if dim in (-1, scores.dim() - 1) else None


@wraps(TORCH_SDPA)
def _observed_sdpa(*args: Any, **kwargs: Any) -> Tensor:
    if not _is_reported():
        return TORCH_SDPA(*args, **kwargs)
    with _unreported():
        result = TORCH_SDPA(*args, **kwargs)
        for observer in tuple(_observers):
            observer.saw_torch_call(lambda: _describe_sdpa(*args, **kwargs))
    return result


def _describe_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> InterfaceCall:
    del value, dropout_p, enable_gqa
    return InterfaceCall(
        function=TORCH_SDPA,
        is_eager=False,
        module=NO_MODULE,
        query=query,
        key=key,
        attention_mask=attn_mask,
        weights=None,
        n_positional=0,
        others={"is_causal": is_causal, "scaling": scale},
    )


def _observed_update(update: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(update)
    def observed(cache: Cache, key_states: Any, value_states: Any, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for observer in tuple(_observers):
                observer.caches(cache, key_states, layer_idx)
        return update(cache, key_states, value_states, layer_idx, *args, **kwargs)

    return observed
