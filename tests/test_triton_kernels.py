"""Triton's kernels compile to machine code for an NVIDIA H100, which needs no GPU: what the interpreter never does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "tests.entropy.compile_kernels": ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"],
    "tests.spark.decode.compile_kernels": [
        "predict_kernel",
        "key_scores_kernel",
        "select_kernel",
        "multiplier_kernel",
        "weighted_rows_kernel",
        "attend_kernel",
    ],
}


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """All in one process that has not chosen the interpreter: importing torch and Triton takes most of its time."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'normfree[dev]'")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "".join(f"import {module}; {module}.main()\n" for module in KERNELS)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        name for names in KERNELS.values() for name in names
    ]
