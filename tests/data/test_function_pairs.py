"""Prompts and completions from functions."""

from __future__ import annotations

import pytest

from normfree.data.function_pairs import LONGEST_COMPLETION, function_pairs


def test_signature_and_docstring_prompt_the_body() -> None:
    source = 'import os\n\n\ndef f(x):\n    """Twice."""\n    y = 2\n    return y * x\n\n\ndef g():\n    return 1\n'
    prompt, completion = 'def f(x):\n    """Twice."""\n', "    y = 2\n    return y * x\n"
    assert list(function_pairs(source)) == [{"prompt": prompt, "completion": completion}]


def test_a_method_keeps_its_indentation() -> None:
    source = 'class A:\n    def f(self):\n        """One."""\n        return 1\n'
    (pair,) = function_pairs(source)
    assert pair["prompt"] + pair["completion"] == source.partition("\n")[2]


@pytest.mark.parametrize("body", ["", f"    return {'1' * LONGEST_COMPLETION}\n"])
def test_functions_without_a_body_or_too_long_are_left_out(body: str) -> None:
    assert list(function_pairs(f'def f():\n    """Nothing."""\n{body}')) == []


def test_source_that_does_not_parse_has_none() -> None:
    assert list(function_pairs("def f(:")) == list(function_pairs("\0")) == []
