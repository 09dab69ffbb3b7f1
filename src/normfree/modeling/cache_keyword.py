"""The argument name of a KV cache: ``cache`` here and in transformers from 5.24, ``past_key_values`` before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, Concatenate, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""The name in the installed transformers."""

Module = TypeVar("Module")
Output = TypeVar("Output")


def takes_either_name(
    forward: Callable[Concatenate[Module, ...], Output],
) -> Callable[Concatenate[Module, ...], Output]:
    """Lets ``forward(..., cache=...)`` be called with ``past_key_values`` as well.

    Raises:
        ValueError: when called with both.
    """

    @wraps(forward)
    def renamed(self: Module, *args: Any, **kwargs: Any) -> Output:
        if "past_key_values" in kwargs:
            if "cache" in kwargs:
                raise ValueError("cache and past_key_values are two names for one thing; give one of them")
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(self, *args, **kwargs)

    return renamed
