"""Every command that reads a model refuses a damaged one: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from normfree.data import load_tokenizer, train_tokenizer
from tests.data.made_up import document
from tests.modeling.gguf_files import built, write_gguf

pytest.importorskip("gguf")
WEIGHTS = "model.safetensors"
CORPUS = ("--corpus", "CORPUS", "--sequence-length", "16")
COMMANDS = {
    "entropy": ("entropy", "MODEL", *CORPUS, "--out", "out"),
    "depth": ("depth", "MODEL", *CORPUS, "--out", "out"),
    "depth, second model": ("depth", "WHOLE", "MODEL", *CORPUS, "--sequences", "1", "--out", "out"),
    "prune-layers": ("prune-layers", "MODEL", "--drop", "0", "--out", "out"),
    "to-spark": ("to-spark", "MODEL", "--out", "out"),
    "interpret": ("interpret", "MODEL", *CORPUS, "--out", "out"),
    "remove-norm": ("remove-norm", "MODEL", "--corpus", "CORPUS", "--steps", "9", "--out", "out"),
    "finetune": ("finetune", "MODEL", "--corpus", "CORPUS", "--steps", "2", "--out", "out"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "gpt2"
    torch.manual_seed(0)
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=300, n_positions=32, **ids)).save_pretrained(
        folder
    )
    train_tokenizer((document(seed) for seed in range(40)), 300).save_pretrained(folder)
    return folder


def prefix(folder: Path) -> Path:
    weights = load_file(folder / WEIGHTS)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, folder / WEIGHTS)
    return folder


def missing(folder: Path) -> Path:
    weights = load_file(folder / WEIGHTS)
    del weights["transformer.h.1.attn.c_proj.weight"]
    save_file(weights, folder / WEIGHTS)
    return folder


def other_configuration(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd": 32}))
    return folder


def cut_short(folder: Path) -> Path:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    return folder


def no_gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_text("years of work")
    return folder / "model.gguf"


def half_gguf(folder: Path) -> Path:
    path = write_gguf(built("llama"), folder / "model.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    return path


def larger_tokenizer(folder: Path) -> Path:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<|one|>", "<|more|>"])
    tokenizer.save_pretrained(folder)
    return folder


def larger_gguf_tokenizer(folder: Path) -> Path:
    return write_gguf(built("llama"), folder / "model.gguf", n_token=280)


DAMAGES = (larger_tokenizer, larger_gguf_tokenizer, prefix, missing, other_configuration, cut_short, no_gguf, half_gguf)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_is_refused(
    command: str,
    damage: Callable[[Path], Path],
    normfree: Callable[..., tuple[int, str, str]],
    whole: Path,
    corpus_folder: Path,
    tmp_path: Path,
) -> None:
    model = damage(Path(shutil.copytree(whole, tmp_path / "model")))
    places = {"MODEL": model, "WHOLE": whole, "CORPUS": f"directory:{corpus_folder}"}
    code, out, error = normfree(*(places.get(word, word) for word in COMMANDS[command]))
    assert code == 2, error
    assert error.startswith("normfree: ")
    assert error.count("\n") == 1
    assert str(model) in error
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_measured_and_said_to_be_quantized(
    normfree: Callable[..., tuple[int, str, str]], corpus_folder: Path, tmp_path: Path
) -> None:
    import gguf

    path = write_gguf(built("llama"), tmp_path / "m.gguf", quantized=gguf.GGMLQuantizationType.Q4_1)
    corpus = ("--corpus", f"directory:{corpus_folder}", "--sequence-length", 16, "--sequences", 2)
    said = "Q4_1, dequantized to float32"
    code, out, error = normfree("entropy", path, *corpus, "--out", "entropy", "--json")
    assert code == 0, error
    assert json.loads(out)["quantization"] == said
    code, out, error = normfree("depth", path, *corpus, "--out", "depth")
    assert code == 0, error
    assert f"Weights of m.gguf: {said}" in out
    assert f"m.gguf: {said}" in (tmp_path / "depth/report.html").read_text()
    code, out, error = normfree("prune-layers", path, "--drop", 1, "--out", "pruned")
    assert code == 0, error
    assert said in out
    code, out, error = normfree("entropy", "pruned", *corpus, "--json")
    assert json.loads(out)["quantization"] is None


def test_a_named_tokenizer_that_is_not_the_models(
    normfree: Callable[..., tuple[int, str, str]], whole: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    corpus = ("--corpus", f"directory:{corpus_folder}", "--sequence-length", 16, "--out", "out")
    for size, message in ((310, "has embeddings for 300 tokens"), (280, "has another vocabulary (280 tokens)")):
        train_tokenizer((document(seed) for seed in range(40)), size).save_pretrained(tmp_path / str(size))
        code, _, error = normfree("entropy", whole, *corpus, "--tokenizer", size)
        assert code == 2
        assert message in error
        assert not (tmp_path / "out").exists()
