"""Atomic writes of files and folders, checksums, and paths as users write them."""

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from normfree.errors import InputError

DEFAULT_CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "normfree"
"""Cache of tokenized corpora."""
ANOTHER_CACHE = "give another place for tokens, with --cache-dir"
"""What to do where a cache cannot be written."""
_NEW, _OLD = "new", "old"
"""Names inside the temporary folder of :func:`folder_written_whole`."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces ``path`` if the ``with`` block ends without error.

    Creates the parent folder. Readers see the old file or the new one, never a partial one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``path`` if the ``with`` block ends without error.

    An interrupted process leaves a hidden folder next to ``path``, never a partial ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        temporary, old = Path(beside) / _NEW, Path(beside) / _OLD
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` atomically, in UTF-8."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk, which another folder on it does not fix."""


def check_output_folder(folder: Path, advice: str = "give another output folder") -> None:
    """Checks that files can be written into ``folder`` by writing one and removing it again.

    Permissions alone do not tell: a file system may be read-only, a name too long, a parent a file or a link to itself.

    Raises:
        InputError: the folder cannot be created or written into; the message has the operating system's reason
            and the ``advice``.
        OSError: the disk is full.
    """
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; {advice}")
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # Named like leftovers of a killed process, which readers of the folder ignore.
        handle, name = tempfile.mkstemp(dir=folder, prefix=".normfree.")
        os.close(handle)
        Path(name).unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError) or getattr(error, "errno", None) in NO_SPACE:
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write into {str(folder)!r}: {reason}; {advice}") from error
    finally:
        for each in made:
            with suppress(OSError, ValueError):  # it was not created, or another process has written into it
                each.rmdir()


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; links are followed.

    A pipe would block and a device may never end, so neither is read. A file that grows meanwhile is read at most one
    byte past its first size.

    Raises:
        OSError: there is no such file, it is not a regular one, it cannot be read, or it grows.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise _not_regular(path, mode)
        # The file may have been replaced since: opened this way a pipe does not block, and fstat recognizes it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _not_regular(path, status.st_mode)
            content = file.read(status.st_size + 1)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "no file has a NUL in its name", repr(str(path))) from error
    if len(content) > status.st_size:
        raise OSError(errno.EBUSY, "it grows while it is read; wait until it is written", str(path))
    return content


def _not_regular(path: Path, mode: int) -> OSError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def user_path(text: str) -> Path:
    """A path with ``~`` expanded; ``~name`` of an unknown user stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """True if ``path`` exists; False for names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_difference(folder: Path, expected: Mapping[str, tuple[int, str]]) -> str | None:
    """The first mismatch of the files in ``folder`` with ``expected`` (bytes, SHA-256), in words; None if all match."""
    for name, (n_bytes, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != n_bytes:
            return f"{name} has {path.stat().st_size} bytes, {n_bytes} were written"
        if sha256(path) != digest:
            return f"{name} is not as it was written: its SHA-256 differs"
    return None


def is_unfinished(path: Path) -> bool:
    """True if ``path`` is a leftover of an interrupted :func:`written_whole` or :func:`folder_written_whole`."""
    if re.fullmatch(r"\..+\.[a-z0-9_]{8}(\.\w+)?", path.name) is None:
        return False
    return path.is_file() or (path.is_dir() and {each.name for each in path.iterdir()} <= {_NEW, _OLD})


def remove_unfinished(folder: Path) -> None:
    """Removes leftovers from ``folder`` and its subfolders. Call from the one process that writes there."""
    for path in (*folder.glob(".*"), *folder.glob("*/.*")):
        if not is_unfinished(path):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
