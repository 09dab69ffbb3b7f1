"""The unembedding and its cross-entropy in blocks of tokens: the logits of a batch are never all there.

Logits [n_token, vocab_size] are the largest tensor of a small model's training step, written and read again and again.
Here a block of them is made, turned into losses and gradients where it lies in cache, and dropped. The gradients of the
final residual stream and of the unembedding are made in the same pass, and only multiplied in the backward pass. A
teacher's logits, from which a student learns, are made block by block with the student's.

torch 2.13 has ``torch.nn.functional.linear_cross_entropy``. On a CPU in bfloat16 it takes 3.4 times as long at a
vocabulary of 4,096, twice as long at 50,257, and it has neither soft-caps nor the losses of single tokens with
gradients of their sum.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.compiled import ELEMENT_TYPES, WIDENED, address, library, library_refuses, sizes, widened
from normfree.entropy.scoring import soft_capped

NOT_PREDICTED = -100
"""Label of a token that is not predicted, in transformers and torch."""
NAME, INTERFACE = "cross_entropy", 2
BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Bytes of logits in a block: what stays in a CPU's cache; on a GPU, what keeps it busy."""
OTHER_BLOCK_BYTES = 1 << 26


class SoftTargets(NamedTuple):
    """A teacher's next-token distributions, softmax(logits / temperature), and how much the loss has of them.

    hidden: the teacher's final residual stream [batch, T, width]; without a ``weight`` its logits [batch, T,
        vocab_size].
    weight, bias, softcap: its unembedding, [vocab_size, width] and [vocab_size].
    share: of temperature² · KL(teacher ‖ student) in the loss; the rest is cross-entropy.
    temperature: softens both distributions.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    share: float
    temperature: float


class CrossEntropy(NamedTuple):
    """What :func:`linear_cross_entropy` returns.

    total: the sum over predicted tokens, nats: a float32 scalar with gradients.
    losses: cross-entropy of each token but the last, nats: float32 [batch, T - 1] without gradients, 0 where it is not
        predicted.
    divergences: KL(teacher ‖ student) in the same form, given soft targets.
    """

    total: Tensor
    losses: Tensor
    divergences: Tensor | None


@torch.compiler.disable  # its products and kernels are compiled already
def linear_cross_entropy(
    hidden: Tensor,
    unembedding: nn.Linear,
    labels: Tensor,
    *,
    softcap: float | None = None,
    soft_targets: SoftTargets | None = None,
) -> CrossEntropy:
    """Next-token losses in nats: to rounding ``cross_entropy(unembedding(hidden)[:, :-1].float(), labels[:, 1:])``.

    Products are made in the dtype of autocast; losses, softmax and the sums over blocks in float32. All is float64 for
    a float64 model.

    Args:
        hidden: the normalized final residual stream [batch, T, n_embd].
        unembedding: to [vocab_size].
        labels: int64 [batch, T], shifted in here; -100 marks a token that is not predicted.
        softcap: logits x become softcap · tanh(x / softcap).
        soft_targets: what each predicted token learns from a teacher (Hinton, Vinyals & Dean 2015).
    """
    targets = labels[:, 1:]
    targets = targets.where(targets != NOT_PREDICTED, -1)
    if soft_targets is not None:
        soft_targets = soft_targets._replace(hidden=soft_targets.hidden[:, :-1])
    given = hidden[:, :-1], unembedding.weight, unembedding.bias
    if torch.is_grad_enabled():
        total, losses, divergences = _LinearCrossEntropy.apply(*given, targets, softcap, soft_targets)
    else:  # a function of autograd would make the gradients of weights that take one
        blocks = _Blocks(_Unembedded(*given, softcap), targets, soft_targets)
        blocks.fill(None)
        total, losses, divergences = blocks.total(), blocks.losses, blocks.divergences
    return CrossEntropy(
        total, losses.view(targets.shape), None if soft_targets is None else divergences.view(targets.shape)
    )


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The next-token loss of each token but the first, nats: float32 [batch, T - 1], 0 where its label is -100.

    From whole logits [batch, T, vocab_size], with their gradients.
    """
    targets = labels[:, 1:]
    targets = targets.where(targets != NOT_PREDICTED, -1)
    if logits.requires_grad and torch.is_grad_enabled():
        return _definition(logits[:, :-1].float(), targets)
    # The last token's row is passed over, not cut off, which would copy all others.
    targets = nn.functional.pad(targets, (0, 1), value=-1)
    return _losses(logits.flatten(0, 1), targets.flatten(), with_gradient=False).view(labels.shape)[:, :-1]


class _Unembedded:
    """Logits of blocks of tokens, in the dtype of autocast."""

    def __init__(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, softcap: float | None) -> None:
        device = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else hidden.dtype
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
        self.weight = None if weight is None else weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.softcap = softcap

    def logits(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        if self.weight is None:
            return hidden
        return soft_capped(nn.functional.linear(hidden, self.weight, self.bias), self.softcap)


class _Blocks:
    """Blocks of tokens, and what is made of their logits."""

    def __init__(self, student: _Unembedded, targets: Tensor, soft_targets: SoftTargets | None) -> None:
        self.student, self.targets = student, targets.reshape(-1)
        self.soft_targets = soft_targets
        self.teacher = None if soft_targets is None else _Unembedded(*soft_targets[:4])
        block_bytes = BLOCK_BYTES.get(student.hidden.device.type, OTHER_BLOCK_BYTES)
        assert student.weight is not None
        vocab_size, width = student.weight.shape
        # With fewer rows than the width, a block spends its time on reading weights and adding up their gradients.
        self.n_row = max(width, block_bytes // (vocab_size * student.hidden.dtype.itemsize))
        wide = torch.promote_types(student.hidden.dtype, torch.float32)
        self.losses, self.divergences = (student.hidden.new_empty(len(self.targets), dtype=wide) for _ in range(2))

    def fill(self, gradients: _Gradients | None) -> None:
        """Makes losses, divergences and, if asked for, gradients."""
        with torch.autocast(self.targets.device.type, enabled=False):
            for start in range(0, len(self.targets), self.n_row):
                rows = slice(start, start + self.n_row)
                logits, targets = self.student.logits(rows), self.targets[rows]
                slope = None
                if gradients is not None and self.student.softcap is not None:
                    slope = 1 - (logits.float() / self.student.softcap).square()
                if self.soft_targets is None or self.teacher is None:
                    self.losses[rows] = _losses(logits, targets, with_gradient=gradients is not None)
                else:
                    share, temperature = self.soft_targets[4:]
                    self.losses[rows], self.divergences[rows] = _mixed_losses(
                        logits, self.teacher.logits(rows), targets, share, temperature, gradients is not None
                    )
                if gradients is not None:
                    gradients.add(rows, logits if slope is None else (logits * slope).to(logits.dtype))

    def total(self) -> Tensor:
        if self.soft_targets is None:
            return self.losses.sum()
        share, temperature = self.soft_targets[4:]
        return (1 - share) * self.losses.sum() + share * temperature**2 * self.divergences.sum()


class _Gradients:
    """Gradients of the sum of all losses, of weight and bias in float32 at least."""

    def __init__(self, student: _Unembedded) -> None:
        assert student.weight is not None
        self.student, self.weight = student, student.weight
        self.of_hidden = torch.empty_like(student.hidden)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.of_weight = torch.zeros_like(self.weight, dtype=wide)
        self.of_bias = None if student.bias is None else torch.zeros_like(student.bias, dtype=wide)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """``gradient`` is that of the logits of ``rows``."""
        hidden = self.student.hidden[rows]
        torch.mm(gradient, self.weight, out=self.of_hidden[rows])
        if self.of_weight.dtype == gradient.dtype:
            self.of_weight.addmm_(gradient.T, hidden)
        else:
            self.of_weight += gradient.T @ hidden
        if self.of_bias is not None:
            self.of_bias += gradient.sum(dim=0, dtype=self.of_bias.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        soft_targets: SoftTargets | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = _Unembedded(hidden, weight, bias, softcap)
        gradients = _Gradients(student) if any(ctx.needs_input_grad) else None
        blocks = _Blocks(student, targets, soft_targets)
        blocks.fill(gradients)
        if gradients is not None:
            ctx.save_for_backward(gradients.of_hidden, gradients.of_weight, gradients.of_bias)
            ctx.hidden_shape = hidden.shape
            ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
            ctx.mark_non_differentiable(blocks.losses, blocks.divergences)
        return blocks.total(), blocks.losses, blocks.divergences

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0]
        of_hidden, of_weight, of_bias = (
            None if each is None else (each.to(dtype) * factor).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        assert of_hidden is not None, "hidden has a gradient"
        return of_hidden.view(ctx.hidden_shape), of_weight, of_bias, None, None, None


def _losses(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> Tensor:
    """The loss of each row of logits [n_row, vocab_size], float32; its gradient, if asked for, replaces the logits."""
    if not _has_kernel(logits):
        return _plain_losses(logits, targets, with_gradient=with_gradient)
    taken, losses = widened(logits), torch.empty(len(logits))
    library(NAME, INTERFACE).normfree_cross_entropy(
        ELEMENT_TYPES[taken.dtype],
        address(taken),
        *sizes(*logits.shape),
        *map(address, (targets.contiguous(), losses)),
        ctypes.c_int(with_gradient),
        torch.get_num_threads(),
    )
    if with_gradient and taken is not logits:
        logits.copy_(taken)
    return losses


def _definition(wide: Tensor, targets: Tensor) -> Tensor:
    """Losses [...] of float32 or float64 logits [..., vocab_size], 0 where the target is negative.

    ``cross_entropy`` adds the exponentials of a row one by one, in float32, which is wrong by up to 1e-4 nats for
    49,152 tokens, more for 262,144; logsumexp adds them pairwise.
    """
    losses = wide.logsumexp(dim=-1) - wide.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return losses.where(targets >= 0, 0)


def _float32_at_least(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _has_kernel(logits: Tensor) -> bool:
    is_taken = logits.device.type == "cpu" and logits.dtype in (*ELEMENT_TYPES, *WIDENED)
    return is_taken and library_refuses(NAME, INTERFACE) is None


def _plain_losses(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> Tensor:
    """The same without a kernel."""
    wide = _float32_at_least(logits)
    losses = _definition(wide, targets)
    if with_gradient:
        logits.copy_(_gradient(wide, targets).where((targets >= 0)[:, None], 0))
    return losses


def _gradient(wide: Tensor, targets: Tensor) -> Tensor:
    """softmax(logits), less 1 at each target: exp(x - logsumexp) would have the rounding of a large logsumexp."""
    targets = targets.clamp(min=0)[:, None]
    return wide.softmax(dim=-1).scatter_add_(-1, targets, wide.new_full(targets.shape, -1.0))


def _mixed_losses(
    logits: Tensor, teacher: Tensor, targets: Tensor, share: float, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss and KL(teacher ‖ student) of each row, float32; their mixture's gradient, if asked for, replaces logits."""
    if not _has_kernel(logits) or teacher.dtype != logits.dtype:
        return _plain_mixed_losses(logits, teacher, targets, share, temperature, with_gradient)
    losses, divergences = (torch.empty(len(logits)) for _ in range(2))
    taken = widened(logits)
    library(NAME, INTERFACE).normfree_mixed_cross_entropy(
        ELEMENT_TYPES[taken.dtype],
        *map(address, (taken, widened(teacher).contiguous())),
        *sizes(*logits.shape),
        address(targets.contiguous()),
        *map(ctypes.c_double, (share, temperature)),
        *map(address, (losses, divergences)),
        ctypes.c_int(with_gradient),
        torch.get_num_threads(),
    )
    if with_gradient and taken is not logits:
        logits.copy_(taken)
    return losses, divergences


def _plain_mixed_losses(
    logits: Tensor, teacher: Tensor, targets: Tensor, share: float, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same without a kernel."""
    wide = _float32_at_least(logits)
    is_predicted = targets >= 0
    losses = _definition(wide, targets)
    log_p, log_q = (_log_softmax(_float32_at_least(each) / temperature) for each in (teacher, logits))
    p = log_p.exp()
    divergences = (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(dim=-1).where(is_predicted, 0)
    if with_gradient:
        mixed = log_q.exp_().sub_(p).mul_(share * temperature)
        mixed.add_(_gradient(wide, targets), alpha=1 - share)
        logits.copy_(mixed.where(is_predicted[:, None], 0))
    return losses, divergences


def _log_softmax(wide: Tensor) -> Tensor:
    """The largest is taken off first, so that nothing has the rounding of a large logsumexp."""
    wide = wide - wide.amax(dim=-1, keepdim=True)
    return wide.sub_(wide.logsumexp(dim=-1, keepdim=True))
