"""Which modules of a model are expected to attend, before any of them runs."""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
from typing import Any

from torch import nn

INTERFACE = "get_interface"
"""The method of transformers' attention interface that a module asks for its attention function."""

OWN_ATTENTION = ("scaled_dot_product_attention", "softmax")


def asking_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose code asks transformers for an attention function."""
    return {module for module in model.modules() if INTERFACE in _names_in_forward(module)}


def called_attention(model: nn.Module, asking: set[nn.Module]) -> set[nn.Module]:
    """The innermost modules with "Attention" in their class name, neither inside nor around one that asks.

    They compute attention themselves, or are no softmax attention.
    """
    related = {inner for module in asking for inner in module.modules()}
    called = {module for module in model.modules() if "Attention" in type(module).__name__} - related
    return {module for module in called if not _has_inside(module, asking | called)}


def has_softmax(model: nn.Module) -> bool:
    """Whether the code of any module names a softmax."""
    return any(not _names_in_forward(module).isdisjoint(OWN_ATTENTION) for module in model.modules())


def _has_inside(module: nn.Module, others: set[nn.Module]) -> bool:
    return any(inner is not module and inner in others for inner in module.modules())


def _names_in_forward(module: nn.Module) -> set[str]:
    """Global names and attributes in the code of ``forward`` and of the module's own methods that it calls."""
    if type(module).__module__.startswith("torch.nn.modules"):
        return set()
    names: set[str] = set()
    pending: list[Any] = [type(module).forward]
    while pending:
        code = getattr(inspect.unwrap(pending.pop()), "__code__", None)
        if not isinstance(code, CodeType):
            continue
        found = _names_of(code)
        for name in found - names:
            method = _own_method(type(module), name)
            if method is not None:
                pending.append(method)
        names |= found
    return names


def _names_of(code: CodeType) -> set[str]:
    inner = (_names_of(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


def _own_method(module_class: type[nn.Module], name: str) -> Any:
    """The method of that name; None for those that every module or transformers model has."""
    method = inspect.getattr_static(module_class, name, None)
    if not isinstance(method, FunctionType) or method.__module__.startswith(("torch.", "transformers.modeling_utils")):
        return None
    return method
