"""A norm during removal: it divides by each token's own std until it is switched to a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from normfree.errors import InputError

MIDWAY = "removable"
"""The ``norm`` of a model during removal; no configuration allows it."""
STD = "std"
SPECIAL_STD = "special_std"
VALUES = 1
"""The values' place among the readers of attention's norm; queries and keys have place 0."""
Treatment = Literal["separate", "published"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)


class SpecialTokens:
    """Tokens with a std of their own until their stage of the schedule.

    - ``separate``: the first token of each sequence and end-of-text, for every reader; the std of the others leaves
      them out. In most trained models the first token's residual stream is many times longer than all others.
    - ``published``: end-of-text, for the values only; the std of the others averages over all tokens, as in the
      released models of "Transformers Don't Need LayerNorm at Inference Time".

    All norms of a model share one instance, which sees the tokens before each forward pass.
    """

    def __init__(self, end_of_text: Sequence[int] | None, treatment: Treatment = "separate") -> None:
        self.treatment = treatment
        self.includes_first = treatment == "separate"
        self.end_of_text = end_of_text
        self.mask: Tensor | None = None

    @property
    def has_any(self) -> bool:
        """True while any token is special."""
        return self.includes_first or bool(self.end_of_text)

    @property
    def left_out(self) -> Tensor | None:
        """Tokens that the std of the others leaves out, bool [batch, T, 1]; None for none."""
        return self.mask if self.treatment == "separate" else None

    def concerns(self, reader: int) -> bool:
        """True if the reader divides special tokens by their own std."""
        return self.treatment == "separate" or reader == VALUES

    def see(self, input_ids: Tensor) -> None:
        """Marks the special tokens of whole sequences, ``input_ids`` int64 [batch, T]."""
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in self.end_of_text or ():
            mask |= input_ids == token
        if self.includes_first:
            mask[:, 0] = True
        self.mask = mask[..., None]


class RemovableNorm(nn.Module):
    """A LayerNorm or RMSNorm whose division can be made constant for one reader at a time.

    In training it keeps a running mean of its tokens' stds, ``std_r ← m · std_r + (1 - m) · mean std``, for each reader
    r that still divides by each token's own; the first batch sets it. For special tokens see :class:`SpecialTokens`. A
    constant std does not change: it is no parameter.

    With ``keeps_own_std`` the last batch's stds, [batch, T, 1] with their gradient, stay in ``own_std``.

    x is [batch, T, n_embd]; the result is that of :class:`~normfree.modeling.constant_std.ConstantStdNorm`.
    """

    std: Tensor
    special_std: Tensor

    def __init__(
        self, norm: nn.LayerNorm | nn.RMSNorm, *, n_reader: int, momentum: float, tokens: SpecialTokens
    ) -> None:
        super().__init__()
        self.is_centered = isinstance(norm, nn.LayerNorm)
        self.weight = norm.weight
        self.bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        self.eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
        self.momentum = momentum
        self.tokens = tokens
        self.is_constant = [False] * n_reader
        self.keeps_own_std = False
        self.own_std: Tensor | None = None
        unknown = torch.full((n_reader,), torch.nan, dtype=torch.float32, device=norm.weight.device)
        self.register_buffer(STD, unknown)
        self.register_buffer(SPECIAL_STD, unknown.clone())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = wide - wide.mean(dim=-1, keepdim=True) if self.is_centered else wide
        own_std = (centered.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        if self.keeps_own_std:
            self.own_std = own_std
        if self.training and torch.is_grad_enabled() and not all(self.is_constant):
            self._update(own_std.detach())
        readings = tuple(self._reading(centered, own_std, reader).to(x.dtype) for reader in range(len(self.std)))
        return readings[0] if len(readings) == 1 else readings

    def make_constant(self, reader: int) -> None:
        """``reader`` divides by its running std from now on.

        Raises:
            InputError: it already does, or its running std is not finite.
        """
        if self.is_constant[reader]:
            raise InputError("a norm is removed twice; a schedule removes each once")
        if not self.std[reader].isfinite():
            raise InputError(
                "the std of a norm to remove is not finite: no batch has been seen yet, or training has diverged; "
                "begin the schedule after step 0"
            )
        self.is_constant[reader] = True

    def forget_special_tokens(self) -> None:
        """Drops the std of special tokens, once there are none."""
        if SPECIAL_STD in self._buffers:
            del self._buffers[SPECIAL_STD]

    def _reading(self, centered: Tensor, own_std: Tensor, reader: int) -> Tensor:
        std = self._constant_std(reader) if self.is_constant[reader] else own_std
        scaled = centered / std * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def _constant_std(self, reader: int) -> Tensor:
        has_special = self.tokens.has_any and self.tokens.mask is not None and self.tokens.concerns(reader)
        if not has_special or not self.special_std[reader].isfinite():
            return self.std[reader]
        assert self.tokens.mask is not None
        return torch.where(self.tokens.mask, self.special_std[reader], self.std[reader])

    @torch.no_grad()
    def _update(self, own_std: Tensor) -> None:
        none = torch.zeros_like(own_std, dtype=torch.bool)
        special, left_out = (none if each is None else each for each in (self.tokens.mask, self.tokens.left_out))
        for buffer, among in ((self.std, ~left_out), (self.special_std, special)):
            n = among.sum()
            if n == 0:
                continue
            mean = (own_std * among).sum() / n
            for reader, is_constant in enumerate(self.is_constant):
                if not is_constant:
                    before = buffer[reader] if buffer[reader].isfinite() else mean
                    buffer[reader] = self.momentum * before + (1 - self.momentum) * mean
