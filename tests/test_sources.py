"""Names of models, tokenizers and corpora on the command line: missing paths, bare paths, standard input."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from normfree.data import DataConfig, load_tokenizer
from normfree.data.corpus import CORPORA, open_corpus
from normfree.data.corpus_name import KINDS
from normfree.errors import InputError
from normfree.measurement import measure
from normfree.modeling.loading import load_model
from normfree.sources import local_or_hub, looks_local, split_revision, with_revision
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


@pytest.mark.parametrize("source", ["runs/x", "runs/x@main"])
def test_a_missing_folder_in_a_folder_that_is_here_is_a_path(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_or_hub(source, "model") == source
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="correct the path, or give a Hub id from a folder without 'runs' in it"):
        local_or_hub(source, "model")


def test_revisions_are_of_the_hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert split_revision("gpt2") == ("gpt2", None)
    assert split_revision("o/gpt2@refs/pr/1") == ("o/gpt2", "refs/pr/1")
    assert split_revision("a@b") == ("a@b", None)
    assert with_revision("gpt2", None) == "gpt2"
    assert with_revision("gpt2", "step1000") == "gpt2@step1000"
    for source, revision, message in (
        ("a@b", "main", "a@b is a path"),
        ("./x", "main", "./x is a path"),
        ("gpt2@main", "main", "names a revision itself"),
        ("gpt2", "", "the revision is empty"),
    ):
        with pytest.raises(InputError, match=message):
            with_revision(source, revision)
    with pytest.raises(InputError, match="ends with @"):
        local_or_hub("gpt2@", "model")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache with two revisions of ``owner/name``, branch ``early`` and the newest, and no network: their commits."""
    commits = ["a" * 40, "b" * 40]
    root = tmp_path / "hub" / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    for seed, (commit, ref) in enumerate(zip(commits, ("early", "main"), strict=True)):
        torch.manual_seed(seed)
        config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=290, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(root / "snapshots" / commit)
        words = Tokenizer(WordLevel({"a": 0, "<eos>": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<eos>").save_pretrained(
            root / "snapshots" / commit
        )
        (root / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("normfree.sources.is_offline", lambda: True)
    return commits


def test_a_revision_is_loaded_recorded_and_compared(
    normfree: Normfree, hub_cache: list[str], corpus_folder: Path, tmp_path: Path
) -> None:
    early, newest = (load_pretrained(source) for source in ("owner/name@early", "owner/name"))
    assert [each.loaded_as["commit"] for each in (early, newest)] == hub_cache
    assert not torch.equal(early.model.lm_head.weight, newest.model.lm_head.weight)
    assert load_pretrained("owner/name", revision="early").loaded_as == early.loaded_as
    measured = measure("owner/name", ["a a a"], revision="early")
    assert (measured.name, measured.loaded_as["commit"]) == ("owner/name@early", hub_cache[0])
    with pytest.raises(InputError, match="are for a model that is loaded by its name"):
        measure(early, ["a a a"], revision="early")
    code, out, error = normfree(
        *("depth", "owner/name", "owner/name@early", "--corpus", corpus_folder, "--cache-dir", tmp_path / "cache"),
        *("--sequences", "4", "--sequence-length", "16", "--probes", "2", "--json"),
    )
    assert code == 0, error
    assert [each["commit"] for each in json.loads(out)["loaded_as"].values()] == hub_cache[::-1]
    options = ("--corpus", corpus_folder, "--cache-dir", tmp_path / "cache", "--sequence-length", "16", "--json")
    code, out, error = normfree("entropy", "owner/name", "--revision", "early", *options)
    assert code == 0, error
    assert json.loads(out)["loaded_as"] == {"device": "cpu", "dtype": "fp32", "commit": hub_cache[0]}


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_what_is_not_cached_fails_at_once(normfree: Normfree, corpus_folder: Path) -> None:
    start = time.monotonic()
    for model in ("owner/none", "owner/name@late"):
        code, _, error = normfree("entropy", model, "--corpus", corpus_folder)
        assert code == 2
        assert "the Hub cannot be reached, and the model is not in its cache" in error
    assert time.monotonic() - start < 10  # the Hub's client tries again for half a minute


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
