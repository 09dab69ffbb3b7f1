"""What all tests share: one thread, a small corpus, a run that trains in a second, and the command line."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree import cli, compiled, progress
from normfree.data import DataConfig, PackedData, prepare_data
from normfree.training import Recipe, RunConfig, RunResult, train
from tests.data.made_up import document, write_documents
from tests.small_study import blank_figures, few_rounds, preset_content, preset_file

__all__ = ["blank_figures", "few_rounds", "preset_content", "preset_file"]

SEQUENCE_LENGTH = 16
COMPILED = Path(str(compiled.__file__)).parent
"""The libraries of this installation; read before a test replaces the folder."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that forgets to replace the hub fails at once instead of retrying."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def no_display_left() -> Iterator[None]:
    """A test that leaves a display behind fails, and not the one after it that finds one."""
    before = progress.display()
    yield
    assert progress.display() is before


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> None:
    """Training collects garbage before it builds a model; what the tests before have imported is left out of it."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices of 16 x 16 are slower on several threads, and sums differ with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty made-up documents of a few hundred tokens each."""
    folder = tmp_path_factory.mktemp("corpus")
    return write_documents(folder, {f"{seed}.py": document(seed) for seed in range(80)})


@pytest.fixture(scope="session")
def data(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    """The made-up corpus, tokenized: blocks of 16 tokens."""
    return prepare_data(data_config(corpus_folder), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_run(corpus_folder: Path) -> Callable[..., RunConfig]:
    """A factory of runs: two layers of width 16, a few steps, in float32."""

    def make(
        configuration: str = "SM+LN+G", *, seed: int = 0, model: dict[str, Any] | None = None, **recipe: Any
    ) -> RunConfig:
        small: dict[str, Any] = {
            "steps": 6,
            "batch_size": 4,
            "micro_batch_size": 4,
            "precision": "fp32",
            "telemetry_steps": 2,
            "logging_steps": 1,
            "eval_steps": 3,
            "save_steps": 3,
        }
        return RunConfig(
            model_name="tiny",
            configuration=configuration,
            seed=seed,
            model={"n_layer": 2, "n_head": 2, "n_embd": 16, **(model or {})},
            data=data_config(corpus_folder),
            recipe=Recipe(**{**small, **recipe}),
        )

    return make


@pytest.fixture(scope="session")
def plain_run(
    tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """``tiny_run()``, finished: for tests that read it. It has been trained once for all of them."""
    return train(tiny_run(), data, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As if no C++ kernels had been compiled; the folder that they are looked for in."""
    compiled.forget()
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "__init__.py"))
    yield tmp_path
    compiled.forget()


@pytest.fixture
def library_for(without_libraries: Path) -> Callable[[str, str], None]:
    """Has only the build of a source for one instruction set be found; skips the test where it cannot run here."""

    def take(name: str, instructions: str) -> None:
        library = COMPILED / f"{name}_{instructions}.so"
        runs = compiled.LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("default",))
        if instructions not in runs or not library.exists():
            pytest.skip(f"no library for {instructions}, or no such CPU")
        shutil.copy(library, without_libraries)

    return take


@pytest.fixture
def normfree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in a folder of its own; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        if words[0] in ("study", "train", "entropy"):
            words += ["--cache-dir", str(tmp_path / "cache")]
        monkeypatch.setattr("sys.argv", ["normfree", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def data_config(corpus_folder: Path) -> DataConfig:
    return DataConfig(
        corpus=f"directory:{corpus_folder}",
        vocab_size=290,
        sequence_length=SEQUENCE_LENGTH,
        train_tokens=4096,
        eval_tokens=512,
        eval_fraction=0.2,
    )
