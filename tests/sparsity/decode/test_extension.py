"""The compiled kernels: their build, what is said where they are missing, and their dense products."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normfree.errors import InputError
from normfree.sparsity.decode import decode_backends, extension, pack_feed_forward, sparse_feed_forward

ROOT = Path(__file__).parents[3]
NEEDS_LIBRARY = pytest.mark.skipif(extension.extension_refuses() is not None, reason="no compiled kernels")


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """As if the package stood in a folder without libraries."""
    extension.library.cache_clear()
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    yield tmp_path
    extension.library.cache_clear()


def any_ffn(**options):
    packed = pack_feed_forward(torch.randn(3, 20), torch.randn(5, 20), torch.randn(20, 4))
    return sparse_feed_forward(torch.randn(1, 8), *packed, 4, F.gelu, **options)


def test_a_missing_library_is_named_and_auto_takes_torch(without_library):
    assert "were not compiled" in decode_backends()["cpu"]
    with pytest.raises(InputError, match="backend 'cpu' cannot be used: its kernels were not compiled"):
        any_ffn(backend="cpu")
    assert any_ffn().isfinite().all()


def test_a_broken_library_is_named(without_library):
    (without_library / "spark_decode_default.so").write_bytes(b"not a library")
    assert "could not be loaded" in decode_backends()["cpu"]


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_every_library_that_this_cpu_runs_computes_the_same(monkeypatch, without_library, instructions):
    """The three builds of one source, one after the other, against torch."""
    compiled = Path(extension.feed_forward.__code__.co_filename).parent / f"spark_decode_{instructions}.so"
    needed = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}[instructions]
    runs = {"AVX512": ("AVX512", "AVX2", "DEFAULT"), "AVX2": ("AVX2", "DEFAULT")}
    if needed not in runs.get(torch.backends.cpu.get_cpu_capability(), ("DEFAULT",)) or not compiled.exists():
        pytest.skip(f"no library for {instructions}, or no such CPU")
    shutil.copy(compiled, without_library)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        torch.manual_seed(0)
        packed = pack_feed_forward(
            *(torch.randn(shape).to(dtype) * 0.2 for shape in ((45, 333), (70, 333), (333, 101)))
        )
        q = torch.randn(3, 115).to(dtype)
        expected = sparse_feed_forward(*(each.double() for each in (q, *packed)), 30, F.gelu, backend="torch")
        out = sparse_feed_forward(q, *packed, 30, F.gelu, backend="cpu")
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "n_row", "dim"), [(1, 1, 1), (2, 33, 31), (1, 70, 64), (3, 13, 700)])
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
def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    packed = pack_feed_forward(torch.randn(40, 700), torch.randn(60, 700), torch.randn(700, 90))
    q = torch.randn(2, 100)
    one = sparse_feed_forward(q, *packed, 60, F.gelu, backend="cpu")
    torch.set_num_threads(2)
    try:
        assert torch.equal(sparse_feed_forward(q, *packed, 60, F.gelu, backend="cpu"), one)
    finally:
        torch.set_num_threads(1)


HOOK = """
import pathlib, sys
sys.path.insert(0, {root!r})
import hatch_build
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

class App:
    def display_info(self, text): print("info:", text)
    def display_warning(self, text): print("warning:", text)

class Hook(hatch_build.CustomBuildHook):
    app = App()
    def __init__(self): pass

hatch_build.INSTRUCTION_SETS = {{"default": []}}
data = {{"force_include": {{}}}}
hook = Hook()
hook.initialize("standard", data)
print(sorted(pathlib.Path(path).name for path in data["force_include"].values()), data.get("pure_python"))
hook.finalize("standard", data, "")
"""


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "c++"])
def test_the_build_hook_never_fails(compiler):
    pytest.importorskip("hatchling", reason="hatchling is there while a wheel is built")
    if compiler == "c++" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    command = [sys.executable, "-c", HOOK.format(root=str(ROOT))]
    done = subprocess.run(
        command, env=os.environ | {"CXX": compiler}, capture_output=True, text=True, check=True, timeout=120
    )
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    if compiler == "c++":
        assert first.startswith("info: compiled spark_decode_default.so")
        assert last == "['spark_decode_default.so'] False"
    else:
        assert first.startswith("warning: without compiled kernels for sparse decode: ")
        assert last == "[] None"
