"""Prompts and completions from Python code: a function's signature and docstring, and its body."""

from __future__ import annotations

import ast
from collections.abc import Iterator

LONGEST_PROMPT, LONGEST_COMPLETION = 400, 400
"""Characters; longer functions are left out."""


def function_pairs(source: str) -> Iterator[dict[str, str]]:
    """``prompt`` and ``completion`` of each function in a module's source that has a docstring and a body.

    Source that does not parse has none.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        body = node.body[1].lineno - 1
        prompt, completion = "".join(lines[node.lineno - 1 : body]), "".join(lines[body : node.end_lineno])
        if len(prompt) <= LONGEST_PROMPT and len(completion) <= LONGEST_COMPLETION:
            yield {"prompt": prompt, "completion": completion}
