"""The backends of sparse decode, by name, and which of them can be used."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from normfree.compiled import ELEMENT_TYPES
from normfree.errors import InputError, unknown_name
from normfree.spark.decode import extension, torch_kernels
from normfree.spark.decode.extension import extension_refuses
from normfree.spark.decode.shapes import AttentionInputs, FeedForwardInputs

BACKENDS = ("torch", "cpu", "triton")
"""Names of the kernels; :func:`decode_backends` says which are usable here."""
PREDICTOR_BY_NEURON = {"cpu"}
"""Backends that read the predictor with one row a neuron, as ``nn.Linear`` stores it: as one stream."""
HALF_PRECISION = (torch.bfloat16, torch.float16)


class Kernels(Protocol):
    """One backend's module."""

    def feed_forward(self, inputs: FeedForwardInputs) -> Tensor:
        """``sparse_feed_forward``: [n, d]."""

    def attention(self, inputs: AttentionInputs) -> Tensor:
        """``sparse_attention_decode``: [batch, n_head, value_dim]."""


def decode_backends() -> dict[str, str | None]:
    """Each backend and why it cannot be used on this machine; None if it can."""
    return {"torch": None, "cpu": extension_refuses(), "triton": _triton_refuses()}


def chosen_backend(backend: str, x: Tensor) -> str:
    """The backend for inputs of the dtype and device of ``x``: ``backend`` itself, or what "auto" takes.

    Auto takes the compiled kernels on the CPU and Triton on an NVIDIA GPU, and torch where these cannot be used.

    Raises:
        InputError: the name is unknown, or that backend cannot be used here or with such inputs.
    """
    if backend == "auto":
        backend = "cpu" if x.device.type == "cpu" else "triton"
        return backend if _refuses(backend, x) is None else "torch"
    if backend not in BACKENDS:
        raise unknown_name("sparse decode backend", backend, ["auto", *BACKENDS])
    reason = _refuses(backend, x)
    if reason is not None:
        raise InputError(f"backend {backend!r} cannot be used: {reason}; use 'auto' or 'torch'")
    return backend


def kernels(name: str) -> Kernels:
    """The functions ``feed_forward`` and ``attention`` of a backend that :func:`chosen_backend` has returned."""
    if name == "triton":
        from normfree.spark.decode import triton_decode

        return triton_decode
    return extension if name == "cpu" else torch_kernels


def _refuses(backend: str, x: Tensor) -> str | None:
    if backend == "cpu":
        if x.device.type != "cpu":
            return f"it needs tensors on the CPU, got {x.device}"
        if x.dtype not in ELEMENT_TYPES:
            return f"it computes in float32 and bfloat16, got {x.dtype}"
        return extension_refuses()
    if backend == "triton":
        reason = _triton_refuses()
        if reason is not None:
            return reason
        from normfree.spark.decode.triton_decode import IS_INTERPRETED

        if x.device.type != ("cpu" if IS_INTERPRETED else "cuda"):
            return f"it needs tensors on an NVIDIA GPU (or the CPU and Triton's interpreter), got {x.device}"
        if x.dtype not in (torch.float32, *HALF_PRECISION):
            return f"it computes in float32, bfloat16 and float16, got {x.dtype}"
    return None


def _triton_refuses() -> str | None:
    if find_spec("triton") is None:
        return "it needs the package triton, which comes with torch's CUDA wheels"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    from normfree.spark.decode.triton_decode import IS_INTERPRETED

    return None if IS_INTERPRETED or torch.cuda.is_available() else "there is no CUDA device"
