"""Generation with ``rope_type: longrope``, whose frequencies change once a sequence is longer than the original length.

Keys in a cache are rotated already, by the frequencies of the shorter sequence. At the change they are computed again,
as Phi-3 does; a pass without a cache would have done so at every token.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from normfree.modeling.rotary import PositionOptions, parameter_sets


def outgrows_cached_keys(
    options: PositionOptions, input_ids: torch.Tensor, cache: Cache | None, attention_mask: torch.Tensor | None
) -> bool:
    """True if this step's tokens make the longest sequence longer than the original length, and its keys do not.

    ``input_ids`` [batch, T] are all tokens so far, and ``attention_mask`` [batch, T] is 0 for padding.
    """
    sets = parameter_sets(options).values()
    originals = [each["original_max_position_embeddings"] for each in sets if each.get("rope_type") == "longrope"]
    n_cached = 0 if cache is None else int(cache.get_seq_length())
    if not originals or n_cached == 0:
        return False
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    longest, cached = int(mask.sum(-1).max()), int(mask[:, :n_cached].sum(-1).max())
    return any(cached <= original < longest for original in originals)
