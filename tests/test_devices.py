"""Devices and dtypes by name: what is chosen, refused and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from normfree.devices import default_device, dtype_name, named_device, named_dtype, on_device, runs_on_cpu
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.training import load_pretrained
from normfree.training.pretrained import starting_model

Normfree = Callable[..., tuple[int, str, str]]


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    settled: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("normfree.devices._settle", settled.append)
    return settled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, saved in bfloat16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = NormfreeConfig(vocab_size=290, n_layer=2, n_head=2, n_embd=16, n_positions=32)
    NormfreeForCausalLM(config).bfloat16().save_pretrained(path)
    words = Tokenizer(WordLevel({"a": 0, "<eos>": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<eos>").save_pretrained(path)
    return path


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'; give cpu, cuda or cuda:N"),
        ("cpu:0", "unknown device 'cpu:0'"),
        ("cuda:x", "unknown device 'cuda:x'"),
        ("cuda:", "unknown device 'cuda:'"),
        ("", "unknown device ''"),
        ("meta", "unknown device 'meta'"),
        ("cuda", "torch finds no CUDA device here"),
        ("cuda:1", "torch finds no CUDA device here"),
    ],
)
def test_devices_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_device(name)
    with pytest.raises(InputError, match=message), on_device(name):
        pytest.fail("it was chosen")
    assert default_device() == torch.device("cpu")


def test_a_choice_holds_until_its_end(with_two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_device() == torch.device("cuda")
    with on_device("cpu"):
        assert (default_device(), runs_on_cpu()) == (torch.device("cpu"), True)
        with on_device(None):
            assert default_device() == torch.device("cpu")
        with on_device("cuda:1"):
            assert (default_device(), runs_on_cpu()) == (torch.device("cuda:1"), False)
        assert default_device() == torch.device("cpu")
    assert default_device() == torch.device("cuda")
    assert with_two_gpus == [torch.device("cpu"), torch.device("cuda:1")]
    with pytest.raises(InputError, match="this machine has 2 CUDA devices, cuda:0 to cuda:1"):
        named_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the launcher gives each process a GPU of its own"), on_device("cuda:1"):
        pytest.fail("it was chosen")
    assert default_device() == torch.device("cuda")


def test_dtypes_have_one_name() -> None:
    assert named_dtype(None) is None
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        assert named_dtype(name) == dtype
        assert dtype_name(dtype) == name
    assert dtype_name(torch.float64) == "float64"
    with pytest.raises(InputError, match=r"unknown dtype 'bfloat' \(did you mean 'bf16'\?\)|unknown dtype 'bfloat'"):
        named_dtype("bfloat")


def test_a_model_is_loaded_as_saved_or_as_asked_for(folder: Path) -> None:
    for dtype, name in ((None, "bf16"), ("fp32", "fp32"), ("fp16", "fp16")):
        loaded = load_pretrained(str(folder), device="cpu", dtype=dtype)
        assert loaded.loaded_as == {"device": "cpu", "dtype": name}
        assert {each.dtype for each in loaded.model.parameters()} == {named_dtype(name)}


def test_weights_are_trained_in_float32_whatever_they_were_saved_in(folder: Path) -> None:
    data: Any = SimpleNamespace(statistics={"vocab_size": 290}, train=SimpleNamespace(sequence_length=16))
    saved, model = load_pretrained(str(folder)).model, starting_model(str(folder), data)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.float())


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--device", "cuda", "no CUDA device here"), ("--dtype", "int8", "int8"), ("--revision", "main", "is a path")],
)
@pytest.mark.parametrize("command", ["entropy", "depth", "interpret", "prune-layers", "to-spark", "finetune"])
def test_commands_refuse_in_one_line_and_write_nothing(
    command: str,
    option: str,
    value: str,
    message: str,
    normfree: Normfree,
    folder: Path,
    corpus_folder: Path,
    tmp_path: Path,
) -> None:
    words: list[object] = [command, folder, option, value, "--out", tmp_path / "out"]
    words += {"prune-layers": ["--drop", "1"], "to-spark": []}.get(command, ["--corpus", corpus_folder])
    code, out, error = normfree(*words)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_record_device_and_dtype(normfree: Normfree, folder: Path, tmp_path: Path) -> None:
    code, out, error = normfree("prune-layers", folder, "--drop", "1", "--dtype", "fp16", "--out", "out", "--json")
    assert code == 0, error
    assert json.loads(out)["loaded_as"] == {"device": "cpu", "dtype": "fp16"}
    assert load_pretrained(str(tmp_path / "out")).loaded_as["dtype"] == "fp16"
