"""Mixed precision: autocast, and float16 products on a CPU that round as tensor cores do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.training.recipe import Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)


def autocast(precision: Precision, device: torch.device, *, cache: bool = True) -> AbstractContextManager[object]:
    """Autocast to the dtype of ``precision``, nothing for fp32. ``cache`` keeps the casts of weights until its end."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=cache)


def float32_accumulation(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """:class:`Float32Accumulation` for fp16 on a CPU; other devices accumulate in float32 by themselves."""
    return Float32Accumulation() if precision == "fp16" and device.type == "cpu" else nullcontext()


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
