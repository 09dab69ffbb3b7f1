"""Compiles the CPU kernels (csrc/) where there is a C++ compiler. The installation never needs them:
whatever goes wrong is said in the build's log, and the library is left out.

    python hatch_build.py      compiles them into the source tree, as `pip install --editable .` does; needs hatchling
"""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
PACKAGE = "normfree/compiled"
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
PARALLEL = (["-fopenmp"], ["-fopenmp-simd"], [])
"""What is tried in turn: threads, one thread, and one thread of a compiler that knows nothing of OpenMP."""
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "default": [],
}
TIMEOUT_SECONDS = 300
PLATFORM_TAG = sysconfig.get_platform().replace("-", "_").replace(".", "_")


class CompileError(Exception):
    """Why there is no library, in one line."""


def compile_kernels(folder: Path) -> list[Path]:
    """Compiles a library of each source for each instruction set into ``folder``; returns those that were made.

    Raises:
        CompileError: there is no compiler, or it made none.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not compiler[0]:
        raise CompileError("no C++ compiler (c++, g++ or $CXX)")
    names = INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else {"default": []}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = itertools.product(sorted(SOURCES.glob("*.cpp")), names)
        jobs = [pool.submit(compile_library, compiler, source, name, folder) for source, name in builds]
    found = [each.result() for each in jobs]
    made = [each for each in found if isinstance(each, Path)]
    if not made:
        raise CompileError(str(found[-1]))
    return made


def compile_library(compiler: Sequence[str], source: Path, name: str, folder: Path) -> Path | str:
    """Compiles ``source`` for the instruction set ``name``; returns the library, or the compiler's complaint."""
    library = folder / f"{source.stem}_{name}.so"
    unfinished = folder / f"{library.name}.{os.getpid()}"
    complaint = ""
    for parallel in PARALLEL:
        command = [*compiler, *FLAGS, *INSTRUCTION_SETS[name], *parallel, str(source), "-o", str(unfinished)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
            if done.returncode == 0:
                return unfinished.replace(library)
            complaint = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        except (OSError, subprocess.SubprocessError) as error:
            complaint = str(error)
        finally:
            unfinished.unlink(missing_ok=True)
    return complaint


class CustomBuildHook(BuildHookInterface):
    """Puts the libraries into a wheel, or beside the sources of an editable installation."""

    scratch: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            if version == "editable":
                made = compile_kernels(ROOT / "src" / PACKAGE)
            else:
                self.scratch = tempfile.TemporaryDirectory()
                made = compile_kernels(Path(self.scratch.name))
                build_data["force_include"].update({str(path): f"{PACKAGE}/{path.name}" for path in made})
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{PLATFORM_TAG}"
        except Exception as error:  # an odd platform is no reason to fail: everything works without the libraries
            self.app.display_warning(f"without compiled kernels: {error}")
        else:
            self.app.display_info(f"compiled {', '.join(path.name for path in made)}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.scratch is not None:
            self.scratch.cleanup()


if __name__ == "__main__":
    try:
        print(*compile_kernels(ROOT / "src" / PACKAGE), sep="\n")
    except CompileError as error:
        sys.exit(f"without compiled kernels: {error}")
