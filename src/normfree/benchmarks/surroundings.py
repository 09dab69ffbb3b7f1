"""What every result says beside its figures: the command, the device, and the versions of what computes."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

import torch


def usual_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def surroundings(device: torch.device, description: str | None = None) -> dict[str, str]:
    """``command``, ``device`` (``description``, if given), ``torch`` and ``python``."""
    return {
        "command": command_line(),
        "device": description or _described(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command_line() -> str:
    """What this process was started with, for a shell: ``normfree bench ...``, or the name of another program."""
    program = Path(sys.argv[0]).name
    return shlex.join(["normfree" if program == "__main__.py" else program, *sys.argv[1:]])


def _described(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
