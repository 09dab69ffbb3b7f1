"""How a family declares itself: one module of this package, with one function marked ``@converts``.

The function maps a model to its :class:`~normfree.NormfreeConfig` and its weights under Normfree's names. Families
import no modeling module of transformers: a model is matched by the name and the module of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from normfree.modeling.configuration import NormfreeConfig

Converted = tuple[NormfreeConfig, dict[str, torch.Tensor]]
Converter = Callable[[Any], Converted]


@dataclass(frozen=True)
class Family:
    """A class of transformers and its converter.

    class_name: of the causal language model.
    module: where transformers defines it.
    """

    class_name: str
    module: str
    convert: Converter


FAMILIES: dict[str, Family] = {}
"""The families whose modules have been imported, by class name."""


def converts(model_type: str, class_name: str) -> Callable[[Converter], Converter]:
    """Declares the decorated function as the converter of ``class_name`` in transformers' folder ``model_type``."""

    def declare(convert: Converter) -> Converter:
        module = f"transformers.models.{model_type}.modeling_{model_type}"
        FAMILIES[class_name] = Family(class_name, module, convert)
        return convert

    return declare
