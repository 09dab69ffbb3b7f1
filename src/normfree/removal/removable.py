"""A norm during removal: it divides by each token's own std until it is switched to a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.modeling.qk_norms import FullWidthRMSNorm, PerHeadLayerNorm
from normfree.removal.parts import VALUES

MIDWAY = "removable"
"""The ``norm`` of a model during removal; no configuration allows it."""
STD = "std"
SPECIAL_STD = "special_std"
Treatment = Literal["separate", "published", "measured"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
Statistic = Literal["mean", "median"]


Removable = nn.LayerNorm | nn.RMSNorm | PerHeadLayerNorm


def statistic_of(stds: Tensor, statistic: Statistic | float) -> Tensor:
    """The mean, median or quantile of ``stds``, [n]; quantiles interpolate linearly."""
    if statistic == "mean":
        return stds.mean()
    return torch.quantile(stds, 0.5 if statistic == "median" else statistic)


def ratio_to_median(stds: Tensor) -> Tensor:
    """Each token's std over the median of its sequence, [batch, T, 1], without gradient through the median."""
    return stds / torch.quantile(stds.detach(), 0.5, dim=1, keepdim=True)


def by_head(stds: Tensor, among: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both head by head, [tokens] each, from [batch, T, heads, 1]; in one piece from [batch, T, 1]."""
    return [
        (own.flatten(), chosen.flatten())
        for own, chosen in zip(stds.flatten(2).unbind(-1), among.flatten(2).unbind(-1), strict=True)
    ]


class SpecialTokens:
    """Tokens with a std of their own until their stage of the schedule.

    - ``separate``: the first token of each sequence and end-of-text, for every reader; the std of the others leaves
      them out. In most trained models the first token's residual stream is many times longer than all others.
    - ``published``: end-of-text, for the values only; the std of the others averages over all tokens, as in the
      released models of "Transformers Don't Need LayerNorm at Inference Time".
    - ``measured``: wherever its position, a token whose std before a norm is more than ``factor`` times the median of
      its sequence; the std of the others leaves it out. A constant norm divides by a token's own std where this is more
      than ``factor`` times the constant, and from the stage ``massive_tokens`` on by the constant, but no less than the
      share of its own std. What the norm returns thus stays bounded, by 1 / share: without a bound, a network that
      multiplies what it reads makes such a token, or all of a strange sequence, longer from block to block.

    All norms of a model share one instance, which sees the tokens before each forward pass.

    shares: how much of its own std a kind of token keeps: 1 before its stage, then down to 0.
    seen: the tokens that were seen last, int64 [batch, T].
    """

    def __init__(
        self, end_of_text: Sequence[int] | None, treatment: Treatment = "separate", *, factor: float = 8.0
    ) -> None:
        self.treatment = treatment
        self.factor = factor
        self.end_of_text = end_of_text
        self.shares = {
            "end_of_text": float(treatment != "measured" and bool(end_of_text)),
            "first_token": float(treatment == "separate"),
            "massive_tokens": float(treatment == "measured"),
        }
        self.seen: Tensor | None = None
        self._share: Tensor | None = None

    @property
    def has_any(self) -> bool:
        """True while any token is special."""
        return any(self.shares.values())

    def concerns(self, reader: int) -> bool:
        """True if the reader divides special tokens by their own std."""
        return self.treatment != "published" or reader == VALUES

    def see(self, input_ids: Tensor) -> None:
        """Marks the tokens of whole sequences, ``input_ids`` int64 [batch, T], that are special by what they are."""
        self.seen = input_ids
        share = torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device)
        for token in self.end_of_text or ():
            share[input_ids == token] = self.shares["end_of_text"]
        if self.shares["first_token"]:
            share[:, 0] = self.shares["first_token"]
        self._share = share[..., None]

    def share(self, own_std: Tensor) -> Tensor | None:
        """How much of their own std tokens keep at a norm, float32, broadcastable to ``own_std``; 0 for others.

        None without special tokens.
        """
        if not self.has_any:
            return None
        if self.treatment != "measured":
            return self._share if self._share is None or own_std.dim() == 3 else self._share.unsqueeze(-1)
        return (ratio_to_median(own_std.detach()) > self.factor).float() * self.shares["massive_tokens"]


class RemovableNorm(nn.Module):
    """A LayerNorm or RMSNorm whose division can be made constant for one reader at a time.

    In training, unless ``is_aside``, it keeps a running mean of a statistic of its tokens' stds,
    ``std_r ← m · std_r + (1 - m) · statistic``, for each reader r that still divides by each token's own; the first
    batch sets it. For special tokens, whose statistic is the mean, see :class:`SpecialTokens`. A constant std does not
    change: it is no parameter. While λ = ``ramp[r]`` is less than 1, a constant reader divides by
    own^(1 - λ) · constant^λ.

    With ``keeps_own_std`` the last batch's stds, [batch, T, 1] with their gradient, stay in ``own_std``, and the tokens
    that the constant averages in ``is_ordinary``. ``largest`` is the largest std since :meth:`begin_step`.

    x is [batch, T, n_embd]; the result is that of :class:`~normfree.modeling.constant_std.ConstantStdNorm`. The gain
    and bias take in the constant factor of a norm of LayerNorm Scaling.
    """

    std: Tensor
    special_std: Tensor
    """[n_reader], or [n_reader, heads]."""

    def __init__(
        self,
        norm: Removable,
        *,
        n_reader: int,
        momentum: float,
        tokens: SpecialTokens,
        statistic: Statistic | float = "mean",
        std_shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.is_centered = not isinstance(norm, nn.RMSNorm)
        self.weight = norm.weight
        self.bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(getattr(norm, "scale", 1.0))
        self.eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
        self.momentum = momentum
        self.tokens = tokens
        self.statistic = statistic
        self.is_constant = [False] * n_reader
        self.ramp = [1.0] * n_reader
        self.is_aside = False
        self.keeps_own_std = False
        self.own_std: Tensor | None = None
        self.is_ordinary: Tensor | None = None
        self.largest: Tensor | None = None
        unknown = torch.full((n_reader, *std_shape), torch.nan, dtype=torch.float32, device=norm.weight.device)
        self.register_buffer(STD, unknown)
        self.register_buffer(SPECIAL_STD, unknown.clone())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = wide - wide.mean(dim=-1, keepdim=True) if self.is_centered else wide
        own_std = (self._mean_square(centered) + self.eps).sqrt()
        share = self.tokens.share(own_std)
        if self.training and torch.is_grad_enabled() and not self.is_aside:
            self._update(own_std.detach(), share)
        if self.keeps_own_std:
            self.own_std, self.is_ordinary = own_std, self._ordinary(own_std, share)
        readings = tuple(self._reading(centered, own_std, share, reader).to(x.dtype) for reader in range(len(self.std)))
        return readings[0] if len(readings) == 1 else readings

    def begin_step(self) -> None:
        """Forgets the largest std of the step before."""
        self.largest = None

    def make_constant(self, reader: int) -> None:
        """``reader`` divides by its running std from now on.

        Raises:
            InputError: it already does, or no batch has been seen yet.
        """
        if self.is_constant[reader]:
            raise InputError("a norm is removed twice; a schedule removes each once")
        if self.std[reader].isnan().any():
            raise InputError("no batch has been seen yet; begin the schedule after step 0")
        self.is_constant[reader] = True

    def forget_special_tokens(self) -> None:
        """Drops the std of special tokens, once there are none."""
        if SPECIAL_STD in self._buffers:
            del self._buffers[SPECIAL_STD]

    def _reading(self, centered: Tensor, own_std: Tensor, share: Tensor | None, reader: int) -> Tensor:
        std = own_std
        if self.is_constant[reader]:
            std, ramp = self._constant_std(own_std, share, reader), self.ramp[reader]
            std = std if ramp == 1 else own_std.pow(1 - ramp) * std.pow(ramp)
        scaled = centered / std * self._gain(centered)
        return scaled if self.bias is None else scaled + self.bias

    def _mean_square(self, centered: Tensor) -> Tensor:
        return centered.square().mean(dim=-1, keepdim=True)

    def _gain(self, x: Tensor) -> Tensor:
        return self.weight

    def _constant_std(self, own_std: Tensor, share: Tensor | None, reader: int) -> Tensor:
        std = self.std[reader].unsqueeze(-1)
        if share is None or not self.tokens.concerns(reader):
            return std
        if self.tokens.treatment == "measured":
            least = self.tokens.shares["massive_tokens"] * own_std
            return torch.where(own_std > self.tokens.factor * std, torch.maximum(std, least), std)
        special = self.special_std[reader].unsqueeze(-1)
        return std.pow(1 - share) * torch.where(special.isfinite(), special, std).pow(share)

    def _ordinary(self, own_std: Tensor, share: Tensor | None) -> Tensor:
        """Tokens that the std of the others takes in, bool like ``own_std``."""
        if share is None or self.tokens.treatment == "published":
            return torch.ones_like(own_std, dtype=torch.bool)
        return (share == 0).expand_as(own_std)

    @torch.no_grad()
    def _update(self, own_std: Tensor, share: Tensor | None) -> None:
        largest = own_std.amax()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if all(self.is_constant):
            return
        kinds = [(self.std, self._ordinary(own_std, share), self.statistic)]
        if share is not None and self.tokens.treatment != "measured":
            kinds.append((self.special_std, (share > 0).expand_as(own_std), "mean"))
        for buffer, among, statistic in kinds:
            for running, (own, chosen) in zip(buffer.view(len(buffer), -1).T, by_head(own_std, among), strict=True):
                if not chosen.any():
                    continue
                value = statistic_of(own[chosen], statistic)
                for reader, is_constant in enumerate(self.is_constant):
                    if not is_constant:
                        before = running[reader] if running[reader].isfinite() else value
                        running[reader] = self.momentum * before + (1 - self.momentum) * value


class RemovableHeadNorm(RemovableNorm):
    """A norm of queries, keys or values whose division can be made constant, with one σ per head.

    x is [batch, T, heads, head_dim]; the result is that of
    :class:`~normfree.modeling.constant_std.ConstantStdHeadNorm`. A norm over all heads at once has one σ.
    """

    def __init__(
        self,
        norm: Removable,
        *,
        n_head: int,
        momentum: float,
        tokens: SpecialTokens,
        statistic: Statistic | float = "mean",
    ) -> None:
        is_full_width = isinstance(norm, FullWidthRMSNorm)
        shape = (1 if is_full_width else n_head,)
        super().__init__(norm, n_reader=1, momentum=momentum, tokens=tokens, statistic=statistic, std_shape=shape)
        self.is_full_width = is_full_width

    def _mean_square(self, centered: Tensor) -> Tensor:
        own = super()._mean_square(centered)
        return own.mean(dim=-2, keepdim=True) if self.is_full_width else own

    def _gain(self, x: Tensor) -> Tensor:
        return self.weight.view(-1, x.shape[-1])
