"""Finding the secure-computation engine: another Python, with SecretFlow SPU, an old JAX and NumPy 1."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from normfree.errors import InputError

ENGINE_VERSION = "0.9.5"
"""The version of SPU that costs are measured with; ``engine/requirements.txt`` installs it."""
ENGINE_FOLDER = Path(__file__).parent / "engine"
PYTHON_VARIABLE = "NORMFREE_ENGINE_PYTHON"
ENVIRONMENT = ".venv-private"
_START_SECONDS = 120


@dataclass(frozen=True)
class Engine:
    """A Python that has the engine, and the engine's version."""

    python: Path
    version: str

    def command(self, script: str, *arguments: object) -> list[str]:
        """The command that runs ``script`` of the engine's folder."""
        return [str(self.python), str(ENGINE_FOLDER / script), *(str(argument) for argument in arguments)]


def find_engine(python: Path | None = None) -> Engine:
    """The engine of ``python``, of ``$NORMFREE_ENGINE_PYTHON``, or of ``.venv-private`` (from ``make private``) in the
    current folder or the source checkout.

    Raises:
        InputError: there is none, it does not start, or it has another version.
    """
    path = python or _python_of_variable() or _default_python()
    if not path.is_file():
        raise InputError(f"no secure-computation engine: {path} does not exist; {_HOW_TO_INSTALL}")
    command = [str(path), str(ENGINE_FOLDER / "versions.py")]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{path} is no Python that has the engine ({error}); {_HOW_TO_INSTALL}") from error
    if answer.returncode:
        reason = next(iter(answer.stderr.strip().splitlines()[-1:]), f"exit code {answer.returncode}")
        raise InputError(f"{path} is no Python that has the engine ({reason}); {_HOW_TO_INSTALL}")
    try:
        version = str(json.loads(answer.stdout.strip().splitlines()[-1])["spu"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} does not answer like the engine's Python; {_HOW_TO_INSTALL}") from error
    if version != ENGINE_VERSION:
        raise InputError(f"{path} has SPU {version}, but costs are measured with {ENGINE_VERSION}; {_HOW_TO_INSTALL}")
    return Engine(path, version)


_HOW_TO_INSTALL = (
    f"run `make private` (it needs Python 3.10 or 3.11), or name the Python of an environment that has "
    f"spu=={ENGINE_VERSION} with --engine-python or ${PYTHON_VARIABLE}"
)


def _python_of_variable() -> Path | None:
    named = os.environ.get(PYTHON_VARIABLE)
    return Path(named) if named else None


def _default_python() -> Path:
    checkout = ENGINE_FOLDER.parents[4]
    here, there = (folder / ENVIRONMENT / "bin" / "python" for folder in (Path.cwd(), checkout))
    return there if there.is_file() and not here.is_file() else here
