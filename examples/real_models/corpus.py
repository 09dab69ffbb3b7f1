"""A small corpus of Python source that nearly every machine has: the beginnings of modules of the standard library.

python -m examples.real_models.corpus FOLDER
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

from normfree.files import folder_written_whole

MODULES = Path(__file__).with_name("modules.txt").read_text(encoding="utf-8").split()
N_CHARACTERS = 2000
"""Of each module: many short documents, so that no single one decides a mean."""


def write_corpus(folder: Path) -> str:
    """Writes the beginning of each module to ``folder``, whole or not at all, and returns the SHA-256 of all text."""
    library = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    with folder_written_whole(folder) as temporary:
        for module in MODULES:
            source = library / f"{module}.py"
            if source.is_file():
                text = source.read_text(encoding="utf-8")[:N_CHARACTERS]
                digest.update(text.encode())
                (temporary / source.name).write_text(text, encoding="utf-8")
    return digest.hexdigest()


if __name__ == "__main__":
    print(write_corpus(Path(sys.argv[1])))
