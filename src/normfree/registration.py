"""transformers' auto classes know Normfree's models from ``import normfree`` on, in either order of the two imports.

Importing transformers' models takes seconds, so ``import normfree`` imports neither transformers nor torch: the model
type is added to transformers' ``CONFIG_MAPPING`` right after transformers has made it, and asking the mapping for it
imports :mod:`normfree.modeling`, which registers its classes with transformers' public functions.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from normfree.quiet import quiet_imports

if TYPE_CHECKING:  # importlib.abc takes longer to import than this module
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
"""The module that makes ``CONFIG_MAPPING``."""
QUANTIZERS = "transformers.quantizers"
"""The part of transformers that imports torchao, for every model."""


def install() -> None:
    """Adds the model type now where transformers' mapping exists already, else as soon as it does."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if CONFIGURATIONS in sys.modules:
        _add_model_type()


@contextmanager
def _then_add_model_type() -> Iterator[None]:
    yield
    _add_model_type()


def _add_model_type() -> None:
    importlib.import_module("normfree.model_type").add()


_AROUND: dict[str, Callable[[], AbstractContextManager[None]]] = {
    CONFIGURATIONS: _then_add_model_type,
    QUANTIZERS: quiet_imports,
}
"""What surrounds the first import of a module."""


class _Finder:
    """Finds the modules of ``_AROUND`` as the other finders do, and surrounds their execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AROUND:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Loader", _Loader(spec.loader))
                return spec
        return None


class _Loader:
    """Another loader in all but this: it runs a module within its context of ``_AROUND``.

    The module itself keeps the other loader.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with _AROUND[module.__name__]():
            self._loader.exec_module(module)
