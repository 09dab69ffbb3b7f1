"""The backends that can be tested here: compiled kernels where there are any, Triton in its interpreter or on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.spark.decode import decode_backends

_REASONS = decode_backends()


def unless_available(name):
    return pytest.mark.skipif(_REASONS[name] is not None, reason=f"{name}: {_REASONS[name]}")


BACKENDS = [pytest.param(name, marks=unless_available(name)) for name in _REASONS]
DEVICES = {"torch": "cpu", "cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def dtypes_of(backend):
    return {
        "torch": [torch.float64, torch.float32, torch.bfloat16],
        "cpu": [torch.float32, torch.bfloat16],
        "triton": [torch.float32, torch.bfloat16, torch.float16],
    }[backend]


def check_cases(check, backend):
    """Calls ``check(backend, data)`` for cases that hypothesis draws; Triton's interpreter is slow, and gets fewer."""

    @settings(max_examples=12 if backend == "triton" else 60, deadline=None)
    @given(data=st.data())
    def checked(data):
        check(backend, data)

    checked()
