"""Soft-caps on attention scores, and learned sinks in the normaliser.

Soft-cap (Gemma 2, arXiv 2408.00118, section 2): s = cap · tanh(scale · q·k / cap), before masks and biases.

Learned sink (gpt-oss; Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.3): one
logit b a head joins the normaliser, p_j = e^(s_j) / (e^b + Σ e^(s_j)), and is no key. With π = sigmoid(b - lse), the
attention that the sink takes, and H, the entropy of the softmax over the keys alone, the entropy of keys and sink
together is

    (1 - π) H + h(π),    h(π) = -π ln π - (1 - π) ln(1 - π):

two terms that are never negative, from the entropy and logsumexp of a kernel without sinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normfree.errors import InputError


@dataclass(frozen=True)
class Scoring:
    """From products of queries and keys to scores: ``scale``, then a soft-cap, None for none."""

    scale: float
    softcap: float | None = None


def scoring_of(q: Tensor, scale: float | None, softcap: float | None) -> Scoring:
    """A checked :class:`Scoring`; ``scale`` None means 1/sqrt(head_dim).

    Raises:
        InputError: the soft-cap is no positive number.
    """
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise InputError(f"softcap must be a positive number, got {softcap}; pass None for scores without a soft-cap")
    return Scoring(q.shape[-1] ** -0.5 if scale is None else scale, None if softcap is None else float(softcap))


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    """cap · tanh(scores / cap), in (−cap, cap), of attention scores or logits; unchanged without a cap (Gemma 2)."""
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def check_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """Logits of learned sinks, broadcastable to [batch, n_head, n_query].

    Raises:
        InputError: shape, dtype or device do not fit q.
    """
    batch, n_head, n_query = q.shape[:3]
    if sinks.shape == (n_head,):
        sinks = sinks[None, :, None]
    fits = sinks.dim() == 3 and sinks.shape[0] in (1, batch) and sinks.shape[1] == n_head
    if not fits or sinks.shape[2] not in (1, n_query):
        raise InputError(
            f"sinks must be one logit a head [n_head] = [{n_head}], or [batch or 1, n_head, n_query or 1] with "
            f"[batch, n_head, n_query] = {[batch, n_head, n_query]}, got shape {list(sinks.shape)}"
        )
    if not sinks.is_floating_point():
        raise InputError(f"sinks must have a floating-point dtype, got {sinks.dtype}")
    if sinks.device != q.device:
        raise InputError(f"sinks are on {sinks.device} and q on {q.device}; put them on one device")
    return sinks


def join_sinks(entropy: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``(entropy, attended)`` of a softmax that a learned sink joins.

    entropy, lse: of the softmax over the keys alone, [batch, n_head, n_query], nats.
    sinks: logits, broadcastable to that.

    Returns:
        The entropy of keys and sink together, NaN where ``entropy`` or the sink is not finite; and the share of
        attention that the keys keep, 1 - π. Differentiable in all three arguments.
    """
    # a query without a key has lse -inf and NaN entropy; a finite difference keeps its gradients 0
    difference = (lse - sinks.to(lse.dtype)).masked_fill(lse == -torch.inf, 0.0)
    size = difference.abs()
    rarer = (-size).exp()
    # h(π) of the rarer of the two, which loses nothing
    binary = rarer.log1p() + size * rarer / (1 + rarer)
    attended = difference.sigmoid()
    return attended * entropy + binary, attended
