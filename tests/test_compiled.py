"""The C++ kernels: their build, and what is said where they are missing."""

import ctypes
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from normfree import compiled
from normfree.entropy import compiled_attention, compiled_kernels
from normfree.modeling import activation_kernels
from normfree.spark.decode import extension

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "csrc").glob("*.cpp"))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_and_a_broken_library_are_named(without_libraries, name):
    assert "were not compiled" in str(compiled.library_refuses(name, 1))
    with pytest.raises(compiled.NotCompiledError, match="were not compiled"):
        compiled.library(name, 1)
    (without_libraries / f"{name}_default.so").write_bytes(b"not a library")
    compiled.forget()
    assert "could not be loaded" in str(compiled.library_refuses(name, 1))


@pytest.mark.parametrize("kernels", [activation_kernels, compiled_attention, compiled_kernels, extension])
def test_a_library_of_other_sources_is_refused(kernels):
    if compiled.library_refuses(kernels.NAME, kernels.INTERFACE) is not None:
        pytest.skip("no compiled kernels")
    assert isinstance(compiled.library(kernels.NAME, kernels.INTERFACE), ctypes.CDLL)
    assert "install normfree again" in str(compiled.library_refuses(kernels.NAME, kernels.INTERFACE + 1))


def test_an_address_keeps_the_copy_that_was_made_for_it():
    column = torch.arange(20.0).view(10, 2)[:, 1]
    copy = column.contiguous()
    kept, pointer = weakref.ref(copy), compiled.address(copy)
    del copy
    assert kept() is not None
    read = ctypes.CDLL(None).memcpy
    found = torch.empty(10)
    read(compiled.address(found), pointer, ctypes.c_size_t(40))
    assert found.tolist() == column.tolist()
    del pointer
    assert kept() is None


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
        libraries = [f"{name}_default.so" for name in NAMES]
        assert first == f"info: compiled {', '.join(libraries)}"
        assert last == f"{libraries} False"
    else:
        assert first.startswith("warning: without compiled kernels: ")
        assert last == "[] None"
