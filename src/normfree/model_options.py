"""How the parts of a model declare its options.

A part (norms, attention, ...) declares its options in the file that uses them, as a dataclass that extends
:class:`ModelOptions`. :class:`normfree.NormfreeConfig` inherits from every part, so an option is declared in one file.

No ``from __future__ import annotations`` in those files: transformers checks values against the annotations.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import get_annotations
from math import inf, isfinite
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

from normfree.errors import InputError, unknown_name

Check = Callable[[str, Any], None]
"""Raises InputError for a value that it refuses, given the option's name and the value."""
T = TypeVar("T")
if TYPE_CHECKING:
    Filled = Annotated[T, "None until it is filled in"]
    Named = Annotated[str, "a bool until it is read"]
else:
    Filled = Optional
    Named = str | bool
_DECLARATION = "normfree"


@dataclass(frozen=True)
class _Declaration:
    """The arguments of :func:`option` and :func:`option_of`."""

    check: Check | None
    read: Callable[[Any, Any], Any] | None
    fill: Any
    choices: tuple[str, ...] = ()
    kinds: Collection[str] = ()
    use: str | None = None

    def applies_to(self, options: "ModelOptions") -> bool:
        chosen = [kind for choice in self.choices for kind in _listed(getattr(options, choice))]
        return not self.choices or any(kind in self.kinds for kind in chosen)


def option(
    default: Any = None, *, check: Check | None = None, read: Callable[[Any, Any], Any] | None = None, fill: Any = None
) -> Any:
    """A field that every model has.

    Args:
        default: value of an option that is left out.
        check: see :data:`Check`; not called for None.
        read: maps options and a value to the value that it means.
        fill: replaces None; a function of the options where it is callable.
    """
    return field(default=default, metadata={_DECLARATION: _Declaration(check, read, fill)})


def option_of(
    *choices: str,
    kinds: Collection[str],
    default: Any = None,
    check: Check | None = None,
    fill: Any = None,
    use: str | None = None,
) -> Any:
    """A field that has an effect only where one of the options ``choices`` is one of ``kinds``; else it is refused.

    Args:
        choices, kinds: names of options, and values of theirs.
        default, check, fill: as for :func:`option`.
        use: what the error suggests; default: the kinds.
    """
    return field(default=default, metadata={_DECLARATION: _Declaration(check, None, fill, choices, kinds, use)})


@dataclass(kw_only=True)
class ModelOptions:
    """The options of a part.

    A part may define ``check_together()``, which checks its options against each other and raises InputError. It is
    called for each part once every option has its value; it does not call that of another part.
    """

    @classmethod
    @cache
    def option_names(cls) -> tuple[str, ...]:
        """The names of all declared options."""
        parts = [part for part in reversed(cls.__mro__) if issubclass(part, ModelOptions)]
        return tuple(dict.fromkeys(name for part in parts for name in get_annotations(part)))

    def settle_options(self) -> None:
        """Checks every option and fills in defaults that depend on other options.

        Raises:
            InputError: a value is not allowed, or an option has no effect together with the others.
        """
        declared: dict[str, _Declaration] = {
            each.name: each.metadata[_DECLARATION] for each in fields(self) if _DECLARATION in each.metadata
        }
        for name, each in declared.items():
            if each.read is not None:
                setattr(self, name, each.read(self, getattr(self, name)))
            if each.check is not None and getattr(self, name) is not None:
                each.check(name, getattr(self, name))
        for name, each in declared.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and not each.applies_to(self):
                chosen = " and ".join(f"{choice} {getattr(self, choice)!r}" for choice in each.choices)
                kinds = f"one of: {', '.join(each.kinds)}" if len(each.kinds) > 1 else "".join(each.kinds)
                raise InputError(f"{name} means nothing for {chosen}; leave it out, or use {each.use or kinds}")
        for name, each in declared.items():
            if getattr(self, name) is None and each.fill is not None and each.applies_to(self):
                setattr(self, name, each.fill(self) if callable(each.fill) else each.fill)
        for part in reversed(type(self).__mro__):
            if "check_together" in vars(part):
                part.check_together(self)  # type: ignore[attr-defined]


def one_of(allowed: Collection[str] | Callable[[], Collection[str]], kind: str | None = None) -> Check:
    """A check for a name, or a list of names, in ``allowed``.

    Args:
        allowed: the names; a function that returns them where they are defined later in the file.
        kind: what errors call such a name; default: the option's name.
    """

    def check(name: str, value: Any) -> None:
        names = allowed() if callable(allowed) else allowed
        for each in _listed(value):
            if each not in names:
                raise unknown_name(kind or name, each, names)

    return check


def _check_number(is_allowed: Callable[[Any], bool], requirement: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not is_allowed(value):
            raise InputError(f"{name} is {value}; it must be {requirement}")

    return check


at_least_one = _check_number(lambda value: value >= 1, "at least 1")
positive = _check_number(lambda value: 0 < value < inf, "positive and finite")
finite = _check_number(isfinite, "finite")
probability = _check_number(lambda value: 0 <= value < 1, "in [0, 1)")


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _default_head_dim(options: "Dimensions") -> int:
    if options.n_embd % options.n_head:
        raise InputError(
            f"n_embd ({options.n_embd}) is not divisible by n_head ({options.n_head}); "
            "change one of them, or give head_dim"
        )
    return options.n_embd // options.n_head


@dataclass(kw_only=True)
class Dimensions(ModelOptions):
    """Sizes
    ``vocab_size``, ``n_positions`` (longest sequence), ``n_layer``, ``n_head``, ``n_kv_head`` (key and value heads;
    default ``n_head``), ``n_embd``, ``head_dim`` (default ``n_embd / n_head``), ``n_inner`` (width of the feed-forward
    network; default ``4 n_embd``).
    """

    vocab_size: int = option(50257, check=at_least_one)
    n_positions: int = option(1024, check=at_least_one)
    n_layer: int = option(12, check=at_least_one)
    n_head: int = option(12, check=at_least_one)
    n_embd: int = option(768, check=at_least_one)
    n_kv_head: Filled[int] = option(check=at_least_one, fill=lambda options: options.n_head)
    head_dim: Filled[int] = option(check=at_least_one, fill=_default_head_dim)
    n_inner: Filled[int] = option(check=at_least_one, fill=lambda options: 4 * options.n_embd)

    def check_together(self) -> None:
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_head ({self.n_head}) is not divisible by n_kv_head ({self.n_kv_head})")
