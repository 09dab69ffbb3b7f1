"""Suggestions for unknown names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from normfree import NormfreeConfig
from normfree.errors import SYNONYMS, field_names, unknown_name
from normfree.training import RunConfig
from normfree.training.lora import LoraOptions


def test_every_synonym_is_of_an_option() -> None:
    options = {name.rpartition(".")[2] for name in field_names(RunConfig)}
    options |= set(NormfreeConfig.option_names()) | set(LoraOptions.model_fields)
    assert set(SYNONYMS) <= options
    synonyms = [each for names in SYNONYMS.values() for each in names]
    assert len(set(synonyms)) == len(synonyms)
    assert not set(synonyms) & options


@pytest.mark.parametrize("command", ["finetune", "remove-norm"])
@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("recipe.lr=3", "recipe.learning_rate"),
        ("lr=3", "recipe.learning_rate"),
        ("recipe.per-device-train-batch-size=3", "recipe.micro_batch_size"),
        ("model.seq_len=3", "data.sequence_length"),
        ("recip.learning_rate=3", "recipe.learning_rate"),
    ],
)
def test_synonyms_where_a_model_is_fine_tuned(
    command: str,
    change: str,
    meant: str,
    normfree: Callable[..., tuple[int, str, str]],
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("normfree.removal.plan.natural_rule", lambda _: "none")
    monkeypatch.setattr("normfree.training.finetuning.natural_rule", lambda _: "none")
    monkeypatch.setattr("normfree.training.finetuning.prepare_data", lambda *_, **__: None)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300, n_positions=16)).save_pretrained("model")
    code, _, error = normfree(command, "model", "--corpus", corpus_folder, "--set", change, "--out", "out")
    assert code == 2
    assert f"(did you mean {meant!r}?)" in error


def test_a_synonym_in_its_own_section_comes_first() -> None:
    error = unknown_name("option", "b.lr", ["a.learning_rate", "b.learning_rate", "b.lrr"])
    assert "did you mean 'b.learning_rate'" in str(error)
