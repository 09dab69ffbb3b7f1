"""The one error that means "the input is wrong, not the program"."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pydantic takes a third of the time of ``normfree --help``
    from collections.abc import Iterable

    from pydantic import BaseModel, ValidationError


class InputError(ValueError):
    """Bad input: a file, config value, checkpoint or command-line argument that cannot be used.

    The message is one line that says what is wrong, where, what is allowed and what to do. The command line
    prints it alone and exits with code 2.
    """


class RunFailedError(Exception):
    """A run that could not go on, through no fault of its input: a full disk, a loss that is no number.

    The message is one line that says what happened, what is kept and how to go on. The command line prints it alone
    and exits with code 1.
    """


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """An error for ``name`` not being one of ``allowed``, with the nearest allowed name as a suggestion."""
    from difflib import get_close_matches

    names = [str(each) for each in allowed]
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    return InputError(f"unknown {kind} {name!r}{suggestion}; allowed: {', '.join(names)}")


def invalid_fields(where: str, error: ValidationError, schema: type[BaseModel]) -> InputError:
    """The first mistake that pydantic found in ``where`` (a file, an option), as one line.

    An unknown field is answered with the nearest field of ``schema``.
    """
    first, n_more = error.errors()[0], error.error_count() - 1
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = str(unknown_name("option", path, _field_names(schema)))
    else:
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], (dict, list)) else f" (given: {first['input']!r})"
        message = f"{path}: {reason}{given}" if path else reason
    return InputError(f"{where}: {message}" + (f" (and {n_more} more)" if n_more else ""))


def _field_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    from pydantic import BaseModel

    names = []
    for name, field in schema.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names.extend(_field_names(field.annotation, f"{prefix}{name}."))
    return names
