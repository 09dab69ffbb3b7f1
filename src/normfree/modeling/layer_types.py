"""Which keys each layer attends to, in transformers' terms: ``layer_types`` and ``sliding_window``.

A new kind is one line in ``MASKS``, if transformers' caches know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from normfree.errors import InputError, unknown_name

if TYPE_CHECKING:
    from normfree.modeling.configuration import NormfreeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
MASKS: dict[str, Callable[..., Any]] = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
"""Kinds of attention, and what makes the mask of each from the arguments of transformers' masking functions."""
SMALLEST_WINDOW = 2
"""transformers' sliding cache keeps window - 1 keys."""


def settle_layer_types(config: NormfreeConfig) -> None:
    """Fills in ``layer_types`` of a configuration, and checks it with ``sliding_window``.

    Raises:
        InputError: an unknown kind, not one kind a layer, a window without a sliding layer, or the reverse.
    """
    window = config.sliding_window
    if window is not None and window < SMALLEST_WINDOW:
        raise InputError(
            f"sliding_window is {window}; it counts the keys that a query sees, itself included, and must be at least "
            f"{SMALLEST_WINDOW}; leave it out for full attention"
        )
    given: list[str] | None = config.layer_types
    if given is None:
        config.layer_types = [FULL if window is None else SLIDING] * config.n_layer
    for kind in config.layer_types:
        if kind not in MASKS:
            raise unknown_name("layer type", kind, MASKS)
    if len(config.layer_types) != config.n_layer:
        raise InputError(
            f"layer_types lists {len(config.layer_types)} kinds for n_layer = {config.n_layer}; give one kind per layer"
        )
    if SLIDING in config.layer_types and window is None:
        raise InputError(f"layer_types has {SLIDING}, which needs a window; give sliding_window")
    if SLIDING not in config.layer_types and window is not None:
        raise InputError(f"sliding_window means nothing for layer_types without {SLIDING}; leave one of them out")
    if window is not None and config.attention == "spark":
        raise InputError(
            "sliding_window is not defined for attention 'spark', which chooses its keys among all before the query; "
            "leave it out, or use attention: softmax"
        )


def attention_masks(kinds: list[str], attention_mask: Any, **arguments: Any) -> dict[str, Any]:
    """The mask of each kind in ``kinds``; ``arguments`` are those of transformers' masking functions.

    ``attention_mask`` is a padding mask [batch, T], or such a dictionary, as ``generate`` makes for a static cache.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    return {kind: MASKS[kind](attention_mask=attention_mask, **arguments) for kind in dict.fromkeys(kinds)}
