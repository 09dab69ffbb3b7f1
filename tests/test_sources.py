"""Names of models, tokenizers and corpora on the command line: missing paths, bare paths, standard input."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from normfree.data import DataConfig, load_tokenizer
from normfree.data.corpus import CORPORA, open_corpus
from normfree.data.corpus_name import KINDS
from normfree.errors import InputError
from normfree.files import local_or_hub, looks_local
from normfree.modeling.loading import load_model
from normfree.training import RunConfig, load_pretrained

Normfree = Callable[..., tuple[int, str, str]]
PATHS = ("./x", "../x", "a/b/c", "/nowhere/x", "~/nowhere-at-all", "~nobody-here/x", "x/", "x.gguf", "a/x.safetensors")
HUB_IDS = ("gpt2", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B", "EleutherAI/pythia-1.4b", "a/v1.0", "o/model.py3")
ONE_MODEL = ("entropy", "depth", "interpret", "private-cost", "remove-norm")
WITH_OUT = ("prune-layers", "to-spark", "finetune")


@pytest.mark.parametrize("source", PATHS)
def test_a_missing_path_is_not_looked_for_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("normfree.modeling.loading.AutoModelForCausalLM.from_pretrained", ask)
    monkeypatch.setattr("normfree.data.tokenizer.AutoTokenizer.from_pretrained", ask)
    for load in (load_pretrained, load_model, load_tokenizer):
        with pytest.raises(InputError, match="there is no file or folder"):
            load(source)


@pytest.mark.parametrize("source", HUB_IDS)
def test_hub_ids_stay_possible(source: str) -> None:
    assert not looks_local(source)
    assert local_or_hub(source, "model") == source


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert local_or_hub("~/model", "model") == str(tmp_path / "model")


@pytest.mark.parametrize("command", [*ONE_MODEL, *WITH_OUT])
def test_every_command_refuses_a_missing_model_at_once(command: str, normfree: Normfree, tmp_path: Path) -> None:
    words = [command, "a/b/c", *(("--out", "out") if command in WITH_OUT else ())]
    words += ["--corpus", "installed-python"] if command == "finetune" else []
    code, out, error = normfree(*words)
    assert (code, out) == (2, "")
    assert error.startswith("normfree: there is no file or folder 'a/b/c' for the model;")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["depth", "interpret"])
def test_every_model_is_looked_for_before_the_first_is_loaded(command: str, normfree: Normfree) -> None:
    code, _, error = normfree(command, "gpt2", "./x")
    assert code == 2
    assert "'./x'" in error


@pytest.mark.parametrize(
    "words",
    [
        ("entropy", "gpt2", "--tokenizer", "./t"),
        ("depth", "gpt2", "--tokenizer", "./t"),
        ("interpret", "gpt2", "--tokenizer", "./t"),
        ("prune-layers", "gpt2", "--drop-similar", "1", "--out", "out", "--tokenizer", "./t"),
        ("remove-norm", "gpt2", "--tokenizer", "./t"),
        ("study", "relu-revival", "--preset", "smoke", "--tokenizer", "./t"),
        ("study", "relu-revival", "--preset", "smoke", "--set", "data.tokenizer=./t"),
        ("finetune", "gpt2", "--out", "out", "--corpus", "installed-python", "--set", "data.tokenizer=./t"),
    ],
)
def test_a_missing_tokenizer_is_an_error_before_the_model_is_loaded(words: tuple[str, ...], normfree: Normfree) -> None:
    code, _, error = normfree(*words)
    assert code == 2
    assert error.startswith("normfree: there is no file or folder './t' for the tokenizer;")


@pytest.mark.parametrize(
    "words",
    [
        ("entropy", "gpt2"),
        ("depth", "gpt2"),
        ("interpret", "gpt2"),
        ("prune-layers", "gpt2", "--drop-similar", "1", "--out", "out"),
        ("remove-norm", "gpt2"),
        ("finetune", "gpt2", "--out", "out"),
        ("study", "relu-revival", "--preset", "smoke"),
    ],
)
@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("./texts", "no such file or folder"),
        ("a.jsonl", "no such file or folder"),
        ("file:a", "no file 'a'"),
        ("pairs:a", "no file 'a'; write pairs:PATH"),
        ("directory:a:*.py", "no folder 'a'"),
        ("instaled-python", "did you mean 'installed-python'"),
        ("", "unknown corpus"),
    ],
)
def test_a_missing_corpus_is_an_error_before_the_model_is_loaded(
    words: tuple[str, ...], corpus: str, message: str, normfree: Normfree
) -> None:
    code, _, error = normfree(*words, "--corpus", corpus)
    assert code == 2
    assert message in error


def test_a_run_that_starts_from_a_missing_model_says_so(
    normfree: Normfree, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    content = tiny_run().model_dump(mode="json", exclude_none=True) | {"start_from": "a/b/c", "model": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code, _, error = normfree("train", "run.yaml", "--out", "out")
    assert code == 2
    assert "there is no file or folder 'a/b/c' for the model" in error


def test_a_bare_path_is_a_file_or_a_folder(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A text. " * 20)
    (tmp_path / "texts").mkdir()
    (tmp_path / "codeparrot").mkdir()
    names = {name: DataConfig(corpus=name).corpus for name in ("a.txt", "./a.txt", "texts", "codeparrot", "hf:a/b")}
    assert names == {
        "a.txt": "file:a.txt",
        "./a.txt": "file:./a.txt",
        "texts": "directory:texts",
        "codeparrot": "codeparrot",
        "hf:a/b": "hf:a/b",
    }
    named = open_corpus(DataConfig(corpus=f"directory:{corpus_folder}"))
    assert open_corpus(DataConfig(corpus=str(corpus_folder))).fingerprint == named.fingerprint
    with pytest.raises(InputError, match="no such file or folder"):
        open_corpus(DataConfig(corpus="./none"))


def test_every_kind_of_corpus_can_be_named() -> None:
    assert set(KINDS) == set(CORPORA)


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_a_corpus(
    normfree: Normfree, preset_of_four_steps: Path, monkeypatch: pytest.MonkeyPatch, corpus_folder: Path, tmp_path: Path
) -> None:
    text = "<|endoftext|>".join(path.read_text() for path in sorted(corpus_folder.iterdir())).encode()
    (tmp_path / "all.txt").write_bytes(text)
    study = ("study", "relu-revival", "--preset", preset_of_four_steps, "--only", "SM+G", "--json")
    piped(monkeypatch, text)
    code, out, error = normfree(*study, "--corpus", "-", "--out", "piped")
    assert code == 0, error
    code, file_out, error = normfree(*study, "--corpus", "all.txt", "--out", "of-file")
    assert code == 0, error
    losses = [[row["eval_loss"] for row in json.loads(each)["table"]] for each in (out, file_out)]
    assert losses[0] == losses[1]
    saved = tmp_path / "cache" / "stdin" / f"{hashlib.sha256(text).hexdigest()[:16]}.txt"
    assert saved.read_bytes() == text
    assert yaml.safe_load((tmp_path / "piped" / "study.yaml").read_text())["data"]["corpus"] == f"file:{saved}"


def test_an_empty_standard_input_is_refused(normfree: Normfree, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b" \n")
    code, _, error = normfree("entropy", "gpt2", "--corpus", "-")
    assert code == 2
    assert "standard input is empty" in error


@pytest.fixture
def preset_of_four_steps(corpus_folder: Path, tmp_path: Path) -> Path:
    from tests.small_study import PRESET

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(PRESET))
    return path
