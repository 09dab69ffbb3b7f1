"""Soft-capping of scores and logits (Gemma 2, 2024, Section 2)."""

from __future__ import annotations

import torch


def soft_capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(x / cap), which lies in (−cap, cap), of the shape and dtype of ``x``; ``x`` itself without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap
