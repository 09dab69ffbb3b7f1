"""The unembedding and its cross-entropy in blocks of tokens: the logits of a batch are never all there.

Logits [n_token, vocab_size] are the largest tensor of a small model's training step, written and read again and again.
Here a block of them is made, turned into losses and gradients where it lies in cache, and dropped. The gradients of the
final residual stream and of the unembedding are made in the same pass, and only multiplied in the backward pass.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.compiled import address, library, library_refuses, sizes
from normfree.entropy.scoring import soft_capped

NOT_PREDICTED = -100
"""Label of a token that is not predicted, in transformers and torch."""
NAME, INTERFACE = "cross_entropy", 1
KERNEL_TYPES = {torch.float32: 0, torch.bfloat16: 1}
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Bytes of logits in a block: what stays in a core's cache; on a GPU, what keeps it busy."""
OTHER_BLOCK_BYTES = 1 << 26
FEWEST_ROWS = 32


class CrossEntropy(NamedTuple):
    """What :func:`linear_cross_entropy` returns.

    total: the sum over predicted tokens, nats: a float32 scalar with gradients.
    losses: of each token but the last, nats: float32 [batch, T - 1] without gradients, 0 where it is not predicted.
    """

    total: Tensor
    losses: Tensor


@torch.compiler.disable  # its products and kernels are compiled already
def linear_cross_entropy(
    hidden: Tensor,
    unembedding: nn.Linear,
    labels: Tensor,
    *,
    softcap: float | None = None,
) -> CrossEntropy:
    """Next-token losses in nats: to rounding ``cross_entropy(unembedding(hidden)[:, :-1].float(), labels[:, 1:])``.

    Products are made in the dtype of autocast; losses, softmax and the sums over blocks in float32.

    Args:
        hidden: the normalized final residual stream [batch, T, n_embd].
        unembedding: to [vocab_size].
        labels: int64 [batch, T], shifted in here; -100 marks a token that is not predicted.
        softcap: logits x become softcap · tanh(x / softcap).
    """
    targets = labels[:, 1:]
    targets = targets.where(targets != NOT_PREDICTED, -1)
    total, losses = _LinearCrossEntropy.apply(hidden[:, :-1], unembedding.weight, unembedding.bias, targets, softcap)
    return CrossEntropy(total, losses.view(targets.shape))


class _Blocks:
    """Blocks of tokens, their logits, and what is made of these."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> None:
        device = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else hidden.dtype
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.targets = targets.reshape(-1)
        self.softcap = softcap
        block_bytes = BLOCK_BYTES.get(device, OTHER_BLOCK_BYTES)
        self.n_row = max(FEWEST_ROWS, block_bytes // (self.weight.shape[0] * dtype.itemsize))

    def losses(self) -> Tensor:
        """Of each token, float32 [n_token]; 0 where it is not predicted."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            found = [
                _losses(self._logits(hidden), targets, with_gradient=False)
                for hidden, targets in zip(self.hidden.split(self.n_row), self.targets.split(self.n_row), strict=True)
            ]
        return torch.cat(found)

    def losses_and_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Losses float32 [n_token], and the gradients of their sum, of weight and bias in float32 at least."""
        losses = torch.empty(len(self.hidden), device=self.hidden.device)
        of_hidden = torch.empty_like(self.hidden)
        of_weight = torch.zeros_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        of_bias = None if self.bias is None else torch.zeros_like(self.bias, dtype=of_weight.dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):
            for start in range(0, len(self.hidden), self.n_row):
                rows = slice(start, start + self.n_row)
                logits = self._logits(self.hidden[rows])
                slope = None if self.softcap is None else 1 - (logits.float() / self.softcap).square()
                losses[rows] = _losses(logits, self.targets[rows], with_gradient=True)
                gradient = logits if slope is None else (logits * slope).to(logits.dtype)
                torch.mm(gradient, self.weight, out=of_hidden[rows])
                if of_weight.dtype == gradient.dtype:
                    of_weight.addmm_(gradient.T, self.hidden[rows])
                else:
                    of_weight += gradient.T @ self.hidden[rows]
                if of_bias is not None:
                    of_bias += gradient.sum(dim=0, dtype=of_bias.dtype)
        return losses, of_hidden, of_weight, of_bias

    def _logits(self, hidden: Tensor) -> Tensor:
        return soft_capped(nn.functional.linear(hidden, self.weight, self.bias), self.softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(hidden, weight, bias, targets, softcap)
        if not any(ctx.needs_input_grad):
            losses = blocks.losses()
            return losses.sum(), losses
        losses, *gradients = blocks.losses_and_gradients()
        ctx.save_for_backward(*gradients)
        ctx.hidden_shape = hidden.shape
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor, _ = gradients
        of_hidden, of_weight, of_bias = (
            None if each is None else (each.to(dtype) * factor).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        assert of_hidden is not None, "hidden has a gradient"
        return of_hidden.view(ctx.hidden_shape), of_weight, of_bias, None, None


def _losses(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> Tensor:
    """The loss of each row of logits [n_row, vocab_size], float32; its gradient, if asked for, replaces the logits."""
    is_taken = logits.device.type == "cpu" and logits.dtype in KERNEL_TYPES
    if not is_taken or library_refuses(NAME, INTERFACE) is not None:
        return _plain_losses(logits, targets, with_gradient=with_gradient)
    losses = torch.empty(len(logits))
    library(NAME, INTERFACE).normfree_cross_entropy(
        KERNEL_TYPES[logits.dtype],
        address(logits),
        *sizes(*logits.shape),
        *map(address, (targets.contiguous(), losses)),
        ctypes.c_int(with_gradient),
        torch.get_num_threads(),
    )
    return losses


def _plain_losses(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> Tensor:
    """The same without a kernel."""
    is_predicted = targets >= 0
    targets = targets.where(is_predicted, 0)[:, None]
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    lse = wide.logsumexp(dim=-1, keepdim=True)
    losses = (lse - wide.gather(-1, targets))[:, 0].where(is_predicted, 0)
    if with_gradient:
        probabilities = wide.softmax(dim=-1)  # exp(x - lse) would have the rounding of a large lse
        probabilities.scatter_add_(-1, targets, torch.full_like(lse, -1.0))
        logits.copy_(probabilities.where(is_predicted[:, None], 0))
    return losses.float()
