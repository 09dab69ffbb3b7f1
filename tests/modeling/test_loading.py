"""Damaged model folders: refused by the loading function, with the likely cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from normfree.errors import InputError
from normfree.modeling.loading import load_model

WEIGHTS = "model.safetensors"
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama in one file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def renamed(folder: Path, rename: Callable[[str], str | None]) -> None:
    weights = {rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({name: tensor for name, tensor in weights.items() if name is not None}, folder / WEIGHTS)


def configured(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def sharded(folder: Path) -> dict[str, str]:
    """Saves the model again in shards; where each tensor is."""
    model = load_model(str(folder))
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    return json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    ("prefix", "cause"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
        ("base_model.model.", "PEFT"),
        ("lightning.", "'lightning.'"),
    ],
)
def test_prefixes_of_wrappers(copy: Path, prefix: str, cause: str) -> None:
    renamed(copy, lambda name: prefix + name)
    with pytest.raises(InputError, match=r"21 tensors missing \(lm_head.*21 tensors unexpected") as caught:
        load_model(str(copy))
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_single_missing_tensor(copy: Path, name: str) -> None:
    renamed(copy, lambda each: None if each == name else each)
    with pytest.raises(InputError, match=rf"1 tensor missing \({name}\); the save was cut short"):
        load_model(str(copy))


def test_a_superfluous_tensor(copy: Path) -> None:
    save_file(load_file(copy / WEIGHTS) | {"model.layers.0.extra": torch.ones(2)}, copy / WEIGHTS)
    with pytest.raises(InputError, match=r"1 tensor unexpected \(model.layers.0.extra\)"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"vocab_size": 65}, r"2 tensors of another shape \(lm_head.weight \[64, 16\] for \[65, 16\]"),
        ({"num_hidden_layers": 3}, "9 tensors missing .*layers.2"),
        ({"num_hidden_layers": 1}, "9 tensors unexpected .*layers.1"),
        ({"num_key_value_heads": 1}, "4 tensors of another shape"),
        ({"attention_bias": True}, "8 tensors missing"),
    ],
)
def test_the_configuration_of_another_model(copy: Path, options: dict[str, object], found: str) -> None:
    configured(copy, **options)
    with pytest.raises(InputError, match=found):
        load_model(str(copy))


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"unexpected \(score.weight\).*LlamaForSequenceClassification"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("architecture", ["t5", "clip", "nothing-of-the-kind"])
def test_an_architecture_that_is_no_causal_language_model(copy: Path, architecture: str) -> None:
    configured(copy, model_type=architecture)
    with pytest.raises(InputError, match="cannot load model"):
        load_model(str(copy))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_file_cut_short(copy: Path, cut: int) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[:cut])
    with pytest.raises(InputError) as caught:
        load_model(str(copy))
    assert "\n" not in str(caught.value)


def test_shards_that_are_whole(copy: Path) -> None:
    expected = load_model(str(copy)).state_dict()
    assert len(set(sharded(copy).values())) > 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(str(copy)).state_dict().items())


def test_two_saves_in_one_folder(copy: Path) -> None:
    """transformers leaves the old file when it saves shards, and reads the old one."""
    load_model(str(copy)).save_pretrained(copy, max_shard_size="5KB")
    with pytest.raises(InputError, match="holds two saves"):
        load_model(str(copy))


def test_a_missing_shard(copy: Path) -> None:
    (copy / sorted(sharded(copy).values())[0]).unlink()
    with pytest.raises(InputError, match=r"lacks 1 shard .*\(model-00001-of"):
        load_model(str(copy))


def test_a_damaged_shard(copy: Path) -> None:
    (copy / sorted(sharded(copy).values())[0]).write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"):
        load_model(str(copy))


def test_shards_of_two_saves(copy: Path) -> None:
    shards = sorted(set(sharded(copy).values()))
    shutil.copyfile(copy / shards[0], copy / shards[1])
    with pytest.raises(InputError, match="of different saves"):
        load_model(str(copy))


def test_an_index_that_is_none(copy: Path) -> None:
    sharded(copy)
    (copy / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(InputError, match="is not an index"):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["adapter_config.json", ".metadata"])
def test_folders_of_other_kinds(copy: Path, name: str) -> None:
    (copy / name).write_text("{}")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_model(str(copy))


def test_what_tying_explains_is_no_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, model.transformer.wte.weight)
    # old GPT-2 files also hold the causal mask
    save_file(load_file(tmp_path / WEIGHTS) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}, tmp_path / WEIGHTS)
    load_model(str(tmp_path))


def test_weights_that_are_no_numbers_are_data(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}, copy / WEIGHTS)
    assert load_model(str(copy)).lm_head.weight.isnan().all()
