"""The compiled kernels: what is said where they are missing, each of their builds, and their dense products."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normfree.errors import InputError
from normfree.spark.decode import decode_backends, extension, pack_feed_forward, sparse_feed_forward

NEEDS_LIBRARY = pytest.mark.skipif(extension.extension_refuses() is not None, reason="no compiled kernels")


def any_ffn(**options):
    packed = pack_feed_forward(torch.randn(3, 20), torch.randn(5, 20), torch.randn(20, 4))
    return sparse_feed_forward(torch.randn(1, 8), *packed, 4, F.gelu, **options)


def test_a_missing_library_is_named_and_auto_takes_torch(without_libraries):
    assert "were not compiled" in str(decode_backends()["cpu"])
    with pytest.raises(InputError, match="backend 'cpu' cannot be used: its kernels were not compiled"):
        any_ffn(backend="cpu")
    assert any_ffn().isfinite().all()


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_every_library_that_this_cpu_runs_computes_the_same(library_for, instructions):
    """The three builds of one source, one after the other, against torch."""
    library_for("spark_decode", instructions)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        torch.manual_seed(0)
        packed = pack_feed_forward(
            *(torch.randn(shape).to(dtype) * 0.2 for shape in ((45, 333), (70, 333), (333, 101)))
        )
        q = torch.randn(3, 115).to(dtype)
        exact = pack_feed_forward(*(each.double() for each in packed), backend="torch")
        expected = sparse_feed_forward(q.double(), *exact, 30, F.gelu, backend="torch")
        out = sparse_feed_forward(q, *packed, 30, F.gelu, backend="cpu")
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "n_row", "dim"), [(1, 1, 1), (2, 33, 31), (1, 70, 64), (3, 13, 700), (4, 9, 65), (7, 21, 96)]
)
def test_dense_products_agree_with_float64_numpy(dtype, n, n_row, dim):
    torch.manual_seed(0)
    matrix = torch.randn(n_row, dim).to(dtype)
    vectors, weights = torch.randn(n, dim), torch.randn(n, n_row)
    exact = matrix.double().numpy()
    for mine, right in (
        (extension.all_dots(matrix, vectors), vectors.double().numpy() @ exact.T),
        (extension.weighted_rows(matrix, weights), weights.double().numpy() @ exact),
    ):
        np.testing.assert_allclose(mine.numpy(), right, rtol=0, atol=2e-5)


@NEEDS_LIBRARY
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_threads_do_not_change_a_bit(n):
    torch.manual_seed(0)
    packed = pack_feed_forward(torch.randn(40, 700), torch.randn(60, 700), torch.randn(700, 90))
    q = torch.randn(n, 100)
    one = sparse_feed_forward(q, *packed, 60, F.gelu, backend="cpu")
    torch.set_num_threads(2)
    try:
        assert torch.equal(sparse_feed_forward(q, *packed, 60, F.gelu, backend="cpu"), one)
    finally:
        torch.set_num_threads(1)
