"""Reads attention from the scores that enter a module's own softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.entropy.reference import distribution
from normfree.entropy.visibility import Visibility, hides, visible_range

HIDING_SCORE = -5e3
"""Old models hide a key by adding -1e4 to its score."""


class ReadScores(NamedTuple):
    """Entropy in nats and attention to the first visible key of each query, [batch, n_head, n_query] each."""

    entropy: Tensor
    sink_share: Tensor


def heads_of_scores(scores: Any, module: nn.Module) -> Tensor | None:
    """Scores as [batch, n_head, n_query, n_key]; None if their shape does not have the heads that ``module`` names."""
    named = {name: value for name, value in vars(module).items() if "head" in name and type(value) is int}
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        return None
    if scores.dim() == 4 and scores.shape[1] in named.values():
        return scores.detach()
    n_head = next((named[name] for name in ("num_heads", "n_head", "n_heads") if name in named), 0)
    if scores.dim() == 3 and n_head > 0 and scores.shape[0] % n_head == 0:
        return scores.detach().unflatten(0, (-1, n_head))
    return None


def visibility_of_scores(scores: Tensor) -> Visibility:
    """Keys are hidden by -inf, the most negative number of the dtype, or -1e4."""
    batch, n_head, n_query, n_key = scores.shape
    first, last = visible_range(n_query, n_key, is_causal=False, sliding_window=None)
    hidden = hides(scores)
    if scores.dtype == torch.float32 or scores.dtype == torch.float64:
        # masked in half precision and raised afterwards
        hidden |= scores <= torch.finfo(torch.float16).min / 2
    later = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).triu(n_key - n_query + 1)
    if bool(later.any()) and bool((later & (scores <= HIDING_SCORE)).eq(later).all()):
        hidden |= later
    allowed = _without_repeats(~hidden)
    return Visibility(n_query, n_key, False, None, first, last, allowed, None, scores.device, (batch, n_head))


def _without_repeats(allowed: Tensor) -> Tensor:
    """The mask of the first head if all are equal."""
    first = allowed[:, :1]
    return first if torch.equal(first.expand_as(allowed), allowed) else allowed


def read_scores(scores: Tensor, visibility: Visibility) -> ReadScores:
    """In float32, or float64 for float64 scores."""
    assert visibility.allowed is not None
    scores = scores if scores.dtype == torch.float64 else scores.float()
    n_head = scores.shape[1]
    first_key = visibility.first_key().expand(scores.shape[:2])
    entropies, shares = [], []
    for block in visibility.blocks(scores.shape[0] * n_head * visibility.n_key):
        assert block.allowed is not None
        part = distribution(scores[:, :, block.rows].masked_fill(~block.allowed, -torch.inf), block.allowed)
        entropies.append(part.entropy().clamp_min(0.0))
        index = first_key[..., None, None].expand(-1, -1, part.p.shape[2], 1)
        shares.append(part.p.gather(-1, index)[..., 0])
    entropy, share = (torch.cat(each[::-1], dim=-1).float() for each in (entropies, shares))
    return ReadScores(entropy, share)


def count_nonfinite_scores(scores: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """``(nan, inf)`` among the scores of visible keys, int64 [n_head] each; -inf hides a key."""
    assert visibility.allowed is not None
    nan, inf = scores.isnan() & visibility.allowed, scores.isposinf() & visibility.allowed
    return nan.sum((0, 2, 3)), inf.sum((0, 2, 3))
