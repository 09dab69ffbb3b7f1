"""The source distribution and the wheel that is built from it hold what a user needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import normfree

ROOT = Path(__file__).parents[1]


def build(target: str, source: Path, folder: Path) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is there while a wheel is built")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=source, env=os.environ | {"CXX": "false"}, check=True, capture_output=True, timeout=120)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def test_a_wheel_without_a_compiler_is_pure_and_whole(source_distribution: Path, tmp_path: Path) -> None:
    assert source_distribution.name == f"normfree-{normfree.__version__}"
    assert {path.name for path in (ROOT / "csrc").iterdir()} == {
        path.name for path in (source_distribution / "csrc").iterdir()
    }
    wheel = build("wheel", source_distribution, tmp_path)
    assert wheel.name == f"normfree-{normfree.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/normfree").rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    }
    assert package <= names, "files of the package that the wheel lacks"
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests/")]
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
