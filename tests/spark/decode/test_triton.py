"""What only Triton's backend has; its results are tested with those of the others."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from normfree.spark.decode import pack_feed_forward, sparse_feed_forward
from normfree.spark.decode.backends import chosen_backend

pytest.importorskip("triton", reason="triton is not installed: pip install 'normfree[dev]'")


def test_kernels_compile_for_a_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.spark.decode.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "predict_kernel",
        "key_scores_kernel",
        "select_kernel",
        "multiplier_kernel",
        "weighted_rows_kernel",
        "attend_kernel",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_triton_on_cuda_and_a_step_never_waits_for_the_gpu(dtype):
    assert chosen_backend("auto", torch.empty(1, device="cuda", dtype=dtype)) == "triton"
    shapes = ((64, 512), (64, 512), (512, 128))
    packed = pack_feed_forward(*(torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes))
    q = torch.randn(2, 128, device="cuda", dtype=dtype)
    expected = sparse_feed_forward(q, *packed, 40, F.gelu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sparse_feed_forward(q, *packed, 40, F.gelu)
    graph.replay()
    assert torch.equal(captured, expected)
