"""Sweeps all architectures and writes docs/models.md: ``python -m tests.coverage.write``."""

from __future__ import annotations

import sys

import torch

from tests.coverage.sweep import examine
from tests.coverage.table import PAGE, page
from tests.coverage.tiny_models import model_types


def main() -> int:
    """Writes the page, unless an architecture is neither right nor refused."""
    torch.set_num_threads(1)
    rows = []
    for model_type in model_types():
        row = examine(model_type)
        rows.append(row)
        print(f"{model_type}: {row.status}", *row.faults, sep="\n    ", flush=True)
    faulty = [row.model_type for row in rows if row.faults]
    if faulty:
        print(f"neither right nor refused: {', '.join(faulty)}; {PAGE} is left as it is", file=sys.stderr)
        return 1
    PAGE.write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
