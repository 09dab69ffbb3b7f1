"""A long text as passages: the documents of a corpus that is one long text."""

from __future__ import annotations

from collections.abc import Iterator

PASSAGE_CHARACTERS = 8192
"""A passage is at most this long: some ten sequences, and enough of them in a megabyte to hold some out."""


def passages(text: str, most: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Consecutive parts of ``text`` of at most ``most`` characters, which joined are the text again.

    A passage ends behind a blank line where there is one in its second half, otherwise at the end of a line, and within
    a line only where that alone is too long.
    """
    start = 0
    while len(text) - start > most:
        end = start + most
        half = start + most // 2
        blank, line = text.rfind("\n\n", half, end), text.rfind("\n", start, end)
        cut = blank + 2 if blank >= 0 else line + 1 if line >= 0 else end
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
