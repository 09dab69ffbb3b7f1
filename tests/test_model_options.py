"""How parts declare options: checks, spellings, defaults that depend on others, and options without effect."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from normfree import NormfreeConfig
from normfree.errors import InputError
from normfree.model_options import ModelOptions, finite, one_of, option, option_of, positive


@dataclass(kw_only=True)
class Colours(ModelOptions):
    colour: str = option("red", check=one_of(("red", "blue")), read=lambda options, value: value.lower())
    depth: float | None = option_of("colour", kinds=("blue",), check=positive, fill=0.5)
    deeper: float | None = option_of("colour", kinds=("blue",), check=finite, fill=lambda options: 2 * options.depth)
    checked: list[str] = field(default_factory=list)

    def check_together(self) -> None:
        self.checked.append("colours")


@dataclass(kw_only=True)
class Shapes(Colours):
    shape: str | list[str] = option("round", check=one_of(lambda: ("round", "square"), "form"))
    corners: int | None = option_of("shape", "colour", kinds=("square", "blue"), use="shape: square")

    def check_together(self) -> None:
        self.checked.append("shapes")


def settled(**options: Any) -> Shapes:
    shapes = Shapes(**options)
    shapes.settle_options()
    return shapes


def test_values_are_read_and_filled_in_where_they_have_an_effect() -> None:
    plain, blue, deep = settled(), settled(colour="BLUE"), settled(colour="blue", depth=3.0)
    assert (plain.colour, plain.depth, plain.deeper) == ("red", None, None)
    assert (blue.colour, blue.depth, blue.deeper) == ("blue", 0.5, 1.0)
    assert (deep.depth, deep.deeper) == (3.0, 6.0)
    assert settled(shape=["round", "square"], corners=4).corners == 4
    assert settled(colour="blue", corners=4).corners == 4


def test_every_part_checks_its_options_together_once() -> None:
    assert settled().checked == ["colours", "shapes"]
    assert Shapes.option_names() == ("colour", "depth", "deeper", "checked", "shape", "corners")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "bleu"}, r"unknown colour 'bleu' \(did you mean 'blue'\?\); allowed: red, blue"),
        ({"shape": ["round", "sqare"]}, r"unknown form 'sqare' \(did you mean 'square'\?\)"),
        ({"depth": 1.0}, "depth means nothing for colour 'red'; leave it out, or use blue"),
        (
            {"corners": 3},
            "corners means nothing for shape 'round' and colour 'red'; leave it out, or use shape",
        ),
        ({"colour": "blue", "depth": -1.0}, "depth is -1.0; it must be positive and finite"),
        ({"colour": "blue", "deeper": float("nan")}, "deeper is nan; it must be finite"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        settled(**options)


def test_the_documentation_of_the_configuration_names_every_option() -> None:
    documentation = NormfreeConfig.__doc__ or ""
    ends = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")  # transformers' own
    assert [name for name in NormfreeConfig.option_names() if f"``{name}``" not in documentation] == list(ends)
