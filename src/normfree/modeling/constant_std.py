"""The norm that replaces a removed one: division by a constant instead of each token's own std."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init


class ConstantStdNorm(nn.Module):
    """y_r = (x - mean(x)) / σ_r ⊙ gain + bias, with a constant σ_r for each of its readers r ("Transformers Don't Need
    LayerNorm at Inference Time", Section 3). In place of an RMSNorm there is no mean and no bias.

    It is linear in x: :func:`normfree.remove_norms` folds it into the weights that read it.

    x is [..., n_embd]. With one reader the result is y, like x; an attention norm has two, the queries and keys and the
    values, and its result is the pair of their ys.
    """

    std: torch.Tensor
    """float32 [n_reader], positive; 1 until it is set."""

    def __init__(self, n_embd: int, *, n_reader: int = 1, is_centered: bool = True) -> None:
        super().__init__()
        self.is_centered = is_centered
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if is_centered else None
        self.register_buffer("std", torch.ones(n_reader))

    def set_initial_values(self) -> None:
        init.ones_(self.weight)
        init.ones_(self.std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.is_centered:
            x = x - x.mean(dim=-1, keepdim=True)
        readings = tuple(self._scaled(x, std) for std in self.std)
        return readings[0] if len(readings) == 1 else readings

    def _scaled(self, x: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        scaled = x * (self.weight / std)
        return scaled if self.bias is None else scaled + self.bias


class ConstantStdHeadNorm(ConstantStdNorm):
    """y = (x - mean(x)) / σ_h ⊙ gain + bias for head h: a norm of queries, keys or values with one constant σ per head.

    x is [..., heads, head_dim], and so is the result. It is linear: it folds into the projection that makes x. The
    gains are [head_dim] where all heads share them, else [heads head_dim].
    """

    std: torch.Tensor
    """float32 [1, heads]; [1, 1] in place of a norm over all heads at once."""

    def __init__(self, head_dim: int, *, n_gain: int, n_std: int, is_centered: bool, is_biased: bool) -> None:
        super().__init__(n_gain, is_centered=is_centered)
        self.head_dim = head_dim
        if not is_biased:
            self.bias = None
        self.register_buffer("std", torch.ones(1, n_std))

    def _scaled(self, x: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        scaled = x * (self.weight.view(-1, self.head_dim) / std[:, None])
        return scaled if self.bias is None else scaled + self.bias
