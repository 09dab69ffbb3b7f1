"""Prompts and completions from the installed Python code: a function's signature and docstring, and its body.

    python examples/instruction_pairs.py pairs.jsonl

``normfree finetune MODEL --corpus pairs:pairs.jsonl`` trains on them.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path

from normfree.data import DataConfig
from normfree.data.corpus import open_corpus

LONGEST_PROMPT, LONGEST_COMPLETION = 400, 400
"""Characters; longer functions are left out."""


def pairs_of(source: str) -> Iterator[dict[str, str]]:
    """The functions of a module that have a docstring and a body."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON lines")
    parser.add_argument("--corpus", default="installed-python", help="as for a study")
    parser.add_argument("--pairs", type=int, default=20000, help="at most so many")
    arguments = parser.parse_args()
    corpus = open_corpus(DataConfig(corpus=arguments.corpus, max_document_bytes=32768))
    found = (pair for document in corpus.documents("train") for pair in pairs_of(document))
    with arguments.out.open("w", encoding="utf-8") as file:
        for _, pair in zip(range(arguments.pairs), found, strict=False):
            file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main()
