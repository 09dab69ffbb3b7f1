"""Prompts and completions from the installed Python code: a function's signature and docstring, and its body.

    python examples/instruction_pairs.py pairs.jsonl

``normfree finetune MODEL --corpus pairs:pairs.jsonl`` trains on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from normfree.data import DataConfig
from normfree.data.corpus import open_corpus
from normfree.data.function_pairs import function_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON lines")
    parser.add_argument("--corpus", default="installed-python", help="as for a study")
    parser.add_argument("--pairs", type=int, default=20000, help="at most so many")
    arguments = parser.parse_args()
    corpus = open_corpus(DataConfig(corpus=arguments.corpus, max_document_bytes=32768))
    found = (pair for document in corpus.documents("train") for pair in function_pairs(document))
    with arguments.out.open("w", encoding="utf-8") as file:
        for _, pair in zip(range(arguments.pairs), found, strict=False):
            file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main()
