"""Made-up documents."""

import random
from pathlib import Path

WORDS = ["def", "return", "value", "self", "index", "for", "in", "range", "if", "else", "naïve", "Σ", "x1"]


def document(seed: int, n_words: int = 400) -> str:
    choose = random.Random(seed)
    return f"# document {seed}\n" + "".join(
        choose.choice(WORDS) + choose.choice([" ", "\n    ", "(", "): "]) for _ in range(n_words)
    )


def write_documents(folder: Path, documents: dict[str, str | bytes]) -> Path:
    for name, content in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder
