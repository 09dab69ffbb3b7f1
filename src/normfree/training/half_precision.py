"""fp16 mixed precision on a CPU, where accelerate silently trains in fp32: what a CUDA device does, up to rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)


class Float32Accumulation(TorchDispatchMode):
    """Context manager: float16 matrix products sum in float32 and round once to float16, as tensor cores do.

    A product of two float16 numbers is exact in float32, and a sum beyond 65,504 becomes infinite when it is rounded.
    It covers the forward and the backward pass. PyTorch's own float16 product on a CPU is some ten times slower than
    its float32 one.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and args[0].dtype == torch.float16:
            return func(*(matrix.float() for matrix in args), **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def float16_on_cpu(trainer: Trainer) -> Iterator[None]:
    """While active, ``trainer`` with ``fp16=True`` trains and evaluates in fp16 on a CPU too; elsewhere a no-op.

    That is autocast to float16, float32 master weights, and a loss scaled dynamically, whose updates with infinite or
    NaN gradients are skipped. The Trainer saves and resumes the scaler's state as on CUDA.
    """
    if not trainer.args.fp16 or trainer.accelerator.device.type != "cpu":
        yield
        return
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with Float32Accumulation():
        yield
