"""The model type ``normfree`` in transformers' ``CONFIG_MAPPING``, whose class is imported when it is asked for.

Every way from a name or a folder to a model begins with this public mapping. The mappings from a configuration class to
a model class need nothing: whoever has the class has imported :mod:`normfree.modeling`. Only the mapping's methods as a
mapping are overridden: its private tables may change, and its ``register`` needs the class itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

MODEL_TYPE = "normfree"


class ConfigMapping(type(CONFIG_MAPPING)):  # type: ignore[misc]
    """transformers' mapping from model types to configuration classes, and ``MODEL_TYPE``."""

    def __getitem__(self, key: str) -> type[PreTrainedConfig]:
        if key == MODEL_TYPE:
            _register()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == MODEL_TYPE or super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        names = list(super().keys())
        return names if MODEL_TYPE in names else [*names, MODEL_TYPE]

    def values(self) -> list[type[PreTrainedConfig]]:
        _register()
        return super().values()

    def items(self) -> list[tuple[str, type[PreTrainedConfig]]]:
        _register()
        return super().items()


def add() -> None:
    """Adds the model type to the mapping, which stays the same object: others hold references to it."""
    if not isinstance(CONFIG_MAPPING, ConfigMapping):
        CONFIG_MAPPING.__class__ = ConfigMapping


def _register() -> None:
    importlib.import_module("normfree.modeling")
