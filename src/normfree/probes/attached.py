"""What reads a model while it runs, and has to be taken off it again."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Attached:
    """Attaches itself to a model when it is made, and leaves it with ``close`` or at the end of a ``with`` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError
