"""``--verbose``, before the command or among its options: versions, what is loaded, other libraries' messages."""

from __future__ import annotations

import logging
import platform
from importlib import metadata

OPTION = "--verbose"
VERBOSE_HELP = "Also say versions, what is loaded, other libraries' messages, and where an unexpected error was raised."
_log = logging.getLogger("normfree")
OTHERS = ("transformers", "datasets", "huggingface_hub", "accelerate")
"""Loggers of libraries that speak under ``--verbose``."""
_levels_before: dict[str, int] = {}


def be_verbose(is_asked: bool) -> None:
    """Turns verbosity on; False turns it off again."""
    _log.setLevel(logging.DEBUG if is_asked else logging.NOTSET)
    if is_asked:
        versions = [f"{name} {metadata.version(name)}" for name in ("normfree", "torch", "transformers")]
        _log.debug("%s", ", ".join([*versions, f"Python {platform.python_version()}"]))
    else:
        for name, level in _levels_before.items():
            logging.getLogger(name).setLevel(level)
        _levels_before.clear()


def is_verbose() -> bool:
    """True after ``be_verbose(True)``."""
    return _log.isEnabledFor(logging.DEBUG)


def set_others() -> None:
    """Silences other libraries, whose messages would break up progress; with ``--verbose`` they speak."""
    from transformers.utils import logging as messages

    if not is_verbose():
        messages.set_verbosity_error()
        return
    for name in OTHERS:
        _levels_before.setdefault(name, logging.getLogger(name).level)
        logging.getLogger(name).setLevel(logging.INFO)
