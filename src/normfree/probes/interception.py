"""Seeing every call that models make through transformers' attention interface, without changing any.

A model asks ``ALL_ATTENTION_FUNCTIONS.get_interface(name, eager function of its module)`` for the function
it then calls with query, key, value and mask. While someone observes, what it gets is that very function
behind one that tells the observers afterwards. The model's configuration stays as it is: models branch on the
name of the implementation ("eager", "flash_attention_2", ...), so a name of our own would change what some
of them compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface


@dataclass(frozen=True)
class InterfaceCall:
    """One call of an attention function, as the model made it.

    ``function`` is transformers' or the model's own attention function; ``is_eager`` tells that it is the
    eager one of the model's module. ``weights`` are what it returned beside its output: an eager one's attention
    weights, None of most others. ``others`` are the remaining keyword arguments, ``n_positional`` the
    number of arguments passed by place behind the mask.
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


Observer = Callable[[InterfaceCall], None]

_observers: list[Observer] = []
_get_interface = AttentionInterface.get_interface


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of every attention call of every model in this process, after it is made.

    Calls inside code that ``torch.compile`` is tracing are not told. Observers may come and go in any order.
    """
    if not _observers:
        AttentionInterface.get_interface = _get_observed_interface  # type: ignore[method-assign, assignment]
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
        if not _observers:
            AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]


def _get_observed_interface(
    interface: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
) -> Callable[..., Any]:
    function: Callable[..., Any] = _get_interface(interface, attn_implementation, default)

    @wraps(function)
    def observed(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = function(module, query, key, value, attention_mask, *args, **kwargs)
        if not torch.compiler.is_compiling():
            is_eager, weights = function is default, result[1]
            call = InterfaceCall(function, is_eager, module, query, key, attention_mask, weights, len(args), kwargs)
            for observer in tuple(_observers):
                observer(call)
        return result

    return observed
