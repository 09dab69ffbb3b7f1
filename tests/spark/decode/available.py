"""The backends that can be tested here: compiled kernels where there are any, Triton in its interpreter or on a GPU."""

import pytest
import torch

from normfree.spark.decode import decode_backends

_REASONS = decode_backends()


def _unless_available(name):
    return pytest.mark.skipif(_REASONS[name] is not None, reason=f"{name}: {_REASONS[name]}")


BACKENDS = [pytest.param(name, marks=_unless_available(name)) for name in _REASONS]
QUICK_BACKENDS = [pytest.param(name, marks=_unless_available(name)) for name in ("torch", "cpu")]
INTERPRETER = _unless_available("triton")
DEVICES = {"torch": "cpu", "cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def dtypes_of(backend):
    return {
        "torch": [torch.float64, torch.float32, torch.bfloat16],
        "cpu": [torch.float32, torch.bfloat16],
        "triton": [torch.float32, torch.bfloat16, torch.float16],
    }[backend]
