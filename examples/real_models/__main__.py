"""Measures the two real models and writes docs/real-models.md: python -m examples.real_models [--page]

With ``--page`` the page and its figures are written from the results that are there, without measuring.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from normfree.errors import InputError, RunFailedError
from normfree.files import write_text

from .figures import write_figures
from .measure import measure_all
from .page import render_page

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[2] / "docs"
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "normfree" / "real-models"


def main() -> int:
    try:
        if "--page" not in sys.argv[1:]:
            measure_all(WORK, RESULTS)
        write_figures(RESULTS, DOCS / "images")
        write_text(DOCS / "real-models.md", render_page(RESULTS))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{DOCS / 'real-models.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
