"""What only Triton's backend has; its results are tested with those of the others."""

import pytest
import torch
import torch.nn.functional as F

from normfree.spark.decode import pack_feed_forward, sparse_feed_forward
from normfree.spark.decode.backends import chosen_backend

pytest.importorskip("triton", reason="triton is not installed: pip install 'normfree[dev]'")


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
