"""The real models, loaded once for all tests; a test that needs one which is not installed is skipped by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from examples.real_models.corpus import write_corpus
from examples.real_models.packages import GEMMA3, SMOLLM2, RealModel
from transformers import PreTrainedModel

from normfree.interpret import TokenSequences, token_sequences
from normfree.training import LoadedModel, load_pretrained

REAL = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a model."""
    folder = tmp_path_factory.mktemp("joined")

    @cache
    def path(name: str) -> Path:
        return installed(name).path(folder)

    return path


@pytest.fixture(scope="session")
def loaded(path_of: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """A model, loaded once."""
    return cache(lambda name: load_pretrained(str(path_of(name))))


@pytest.fixture(scope="session")
def python_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "python-source"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def sequences(
    loaded: Callable[[str], LoadedModel], python_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TokenSequences]:
    """Sequences of Python source for a model, as the commands make them."""
    cache_dir = tmp_path_factory.mktemp("cache")

    def make(name: str, n: int, length: int, bos: bool | None = None) -> TokenSequences:
        return token_sequences(
            loaded(name),
            corpus=f"directory:{python_source}",
            tokenizer=None,
            sequence_length=length,
            n_sequences=n,
            cache_dir=cache_dir,
            bos=bos,
        )

    return make


def installed(name: str) -> RealModel:
    model = REAL[name]
    if not model.is_installed:
        pytest.skip(f"{model.name} is not installed; it comes with: make real")
    pytest.importorskip("gguf", reason=f"{model.name} needs the gguf package; it comes with: make real")
    return model


def eager_attentions(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The attention weights that the model itself returns, a layer each [batch, n_head, T, T]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
