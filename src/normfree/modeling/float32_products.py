"""Float32 products of linear layers, by the faster of the two libraries that torch has for a CPU.

torch asks MKL for them, which runs AVX2 code on AMD's processors. oneDNN uses AVX-512 there, and is about twice as
fast; torch's compiler takes it, through the operator that is called here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")
FEWEST_ROWS = 8
"""Fewer are bound by memory bandwidth, with either library."""
_CPU_INFO = Path("/proc/cpuinfo")


class FastProducts(TorchFunctionMode):
    """Context manager and decorator: linear layers of any model multiply float32 by oneDNN, if that is faster here.

    Equal to the usual products to rounding, forward and backward. It changes nothing on other machines, for other
    dtypes and under autocast.
    """

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def fast(*args: P.args, **kwargs: P.kwargs) -> R:
            with FastProducts():
                return function(*args, **kwargs)

        return fast

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not kwargs and onednn_is_faster():
            if func is nn.functional.linear and _is_taken(*args):
                return _Linear.apply(*args) if len(args) == 3 else _Linear.apply(*args, None)
            if func is torch.addmm and len(args) == 3 and args[0].dim() == 1 and _is_taken(args[1], args[2].T, args[0]):
                return _Linear.apply(args[1], args[2].T, args[0])  # transformers' Conv1D
        return func(*args, **(kwargs or {}))


@cache
def onednn_is_faster() -> bool:
    """True on an AMD processor with AVX-512, if torch has MKL and oneDNN."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return _CPU_INFO.exists() and "AuthenticAMD" in _CPU_INFO.read_text()


def _is_taken(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(type(each) in (Tensor, nn.Parameter) for each in tensors)
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
        and weight.dim() == 2
        and x.numel() >= FEWEST_ROWS * weight.shape[1] > 0
        and len(weight) > 0
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """x [..., n_in] times weight [n_out, n_in] transposed, plus bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight))
        return (
            _product(gradient, weight.T) if needs_x else None,
            _product(rows.T, x.reshape(-1, x.shape[-1]).T) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
