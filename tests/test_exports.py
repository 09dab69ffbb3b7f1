"""Models written to folders, as a notebook calls it: the data that the commands print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import train_tokenizer
from normfree.errors import InputError
from normfree.exports import export_spark, export_without_layers


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 4, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 280}
    NormfreeForCausalLM(NormfreeConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    train_tokenizer(iter(["the words of a text, and the words of another one; " * 9] * 3), 270).save_pretrained(folder)
    return str(folder)


def test_layers_by_number_and_from_the_end(dense: str, tmp_path: Path) -> None:
    named = export_without_layers(dense, tmp_path / "named", drop=[3, 1])
    assert (named.dropped_layers, named.n_layer, named.sequences) == ([1, 3], 2, None)
    assert named.has_tokenizer
    assert named.quantization is None
    written = AutoModelForCausalLM.from_pretrained(named.folder)
    assert written.config.n_layer == 2
    assert (written.num_parameters(), named.parameters_before - named.parameters) == (
        named.parameters,
        2 * sum(each.numel() for each in written.model.blocks[0].parameters()),
    )
    assert export_without_layers(dense, tmp_path / "last", drop_last=2).dropped_layers == [2, 3]


def test_similar_layers_are_chosen_on_sequences(dense: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the words of a text, and of another one; " * 60)
    pruned = export_without_layers(
        dense,
        tmp_path / "out",
        drop_similar=2,
        corpus=f"file:{tmp_path / 'text.txt'}",
        sequence_length=8,
        n_sequences=4,
    )
    assert pruned.sequences is not None
    assert pruned.sequences.tokens.shape == (4, 8)
    first, second = pruned.dropped_layers
    assert second == first + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of"),
        ({"drop": [1], "drop_last": 1}, "give exactly one of"),
        ({"drop_last": 1, "corpus": "codeparrot"}, "are for --drop-similar; leave them out"),
        ({"drop_last": 4}, "cannot drop the last 4 of 4 layers; drop 1 to 3"),
        ({"drop": [4]}, "there is no layer 4"),
    ],
)
def test_bad_choices_write_nothing(dense: str, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_without_layers(dense, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_sparse_model(dense: str, tmp_path: Path) -> None:
    spark = export_spark(dense, tmp_path / "spark", attention=False, ffn_active=0.25)
    written = AutoModelForCausalLM.from_pretrained(spark.folder)
    assert (written.config.ffn, written.config.attention) == ("spark", "softmax")
    assert spark.parameters == spark.parameters_before == written.num_parameters()
    with pytest.raises(InputError, match="exists and is not empty"):
        export_spark(dense, spark.folder)
