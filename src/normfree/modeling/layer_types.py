"""Which keys each layer attends to, in transformers' terms: ``layer_types`` and ``sliding_window``.

A new kind is one line in ``MASKS``, if transformers' caches know it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from normfree.errors import InputError
from normfree.model_options import Dimensions, Filled, one_of, option

FULL, SLIDING = "full_attention", "sliding_attention"
MASKS: dict[str, Callable[..., Any]] = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
"""Kinds of attention, and transformers' function that makes the mask of each."""
SMALLEST_WINDOW = 2
"""transformers' sliding cache keeps window - 1 keys."""


def _check_window(name: str, window: int) -> None:
    if window < SMALLEST_WINDOW:
        raise InputError(
            f"{name} is {window}; it counts the keys that a query sees, itself included, and must be at least "
            f"{SMALLEST_WINDOW}; leave it out for full attention"
        )


@dataclass(kw_only=True)
class LayerTypeOptions(Dimensions):
    """Layer types
    ``layer_types``: ``full_attention | sliding_attention`` for each layer, and ``sliding_window``: keys that a query of
    a sliding layer sees, itself included. By default all layers are sliding if there is a window, else full.
    """

    sliding_window: int | None = option(check=_check_window)
    layer_types: Filled[list[str]] = option(
        check=one_of(MASKS, "layer type"),
        fill=lambda options: [FULL if options.sliding_window is None else SLIDING] * options.n_layer,
    )

    def check_together(self) -> None:
        if len(self.layer_types) != self.n_layer:
            raise InputError(
                f"layer_types lists {len(self.layer_types)} kinds for n_layer = {self.n_layer}; give one kind per layer"
            )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise InputError(f"layer_types has {SLIDING}, which needs a window; give sliding_window")
        if SLIDING not in self.layer_types and self.sliding_window is not None:
            raise InputError(f"sliding_window means nothing for layer_types without {SLIDING}; leave one of them out")


def attention_masks(kinds: list[str], attention_mask: Any, **arguments: Any) -> dict[str, Any]:
    """The mask of each kind in ``kinds``; ``arguments`` are those of transformers' masking functions.

    ``attention_mask`` is a padding mask [batch, T], or such a dictionary, as ``generate`` makes for a static cache.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    return {kind: MASKS[kind](attention_mask=attention_mask, **arguments) for kind in dict.fromkeys(kinds)}
