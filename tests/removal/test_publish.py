"""Pushing a removal's exports to a stand-in of the Hub, with huggingface_hub's own client; and its model cards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from normfree import NormfreeForCausalLM, sources
from normfree.data import prepare_data
from normfree.errors import InputError, RunFailedError
from normfree.removal import push_to_hub, remove
from normfree.removal.model_card import base_model, exports
from normfree.removal.publish import check_repository
from normfree.training import RunConfig

from .hub import TOKEN, Hub, Repository, stand_in
from .models import stock
from .small_removals import write_words

Command = Callable[..., tuple[int, str, str]]
T = 24
HEADER = "---\nlicense: other\nlicense_name: test-license\nlicense_link: https://example.org/license\n---\n# Base\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("private-texts"), 200)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with a card."""
    folder = tmp_path_factory.mktemp("private-models") / "tiny-base"
    small = stock("gpt2")
    small.resize_token_embeddings(270)
    small.save_pretrained(folder)
    (folder / "README.md").write_text(HEADER)
    return folder


@pytest.fixture(scope="module")
def finished(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished removal, for tests that read it."""
    small = {"steps": 16, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "learning_rate": 1e-3}
    every = {"logging_steps": 1, "telemetry_steps": 100, "save_steps": 8, "eval_steps": 100}
    run = RunConfig.model_validate(
        {
            "model_name": "small",
            "configuration": "any",
            "model": {},
            "data": {"corpus": f"directory:{corpus}", "vocab_size": 270, "sequence_length": T, "eval_tokens": 20 * T},
            "recipe": small | every,
            "start_from": str(base),
        }
    )
    folder = tmp_path_factory.mktemp("out") / "removal"
    remove(run, prepare_data(run.data, folder.parent / "cache"), folder, None)
    return folder


@pytest.fixture
def removal(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished removal, for tests that change it."""
    return Path(shutil.copytree(finished, tmp_path / "removal"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that this process reaches, with a token for it."""
    sources.is_offline.cache_clear()
    with stand_in() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    sources.is_offline.cache_clear()


def read(text: str) -> tuple[dict[str, Any], str]:
    """The header of a card, and what follows it."""
    card = ModelCard(text)
    return card.data.to_dict(), str(card.text)


def snippet(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return str(code)


def loaded(card: str) -> Any:
    """The model that the card's snippet loads, from the current folder."""
    names: dict[str, Any] = {}
    exec(snippet(card), names)
    assert names["tokenizer"]("def x")["input_ids"]
    return names["model"]


def written(hub: Hub, name: str, folder: Path) -> Path:
    """The repository's files, as a folder."""
    for path, content in hub.repositories[name].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.eval()(torch.arange(12)[None]).logits
    return output


def test_cards_say_what_was_measured_and_their_snippets_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    table = pd.read_csv(finished / "removal.csv").set_index("variant")
    assert exports(finished) == ["stock", "norm-free"]
    models = {}
    for export in exports(finished):
        card = (finished / export / "README.md").read_text(encoding="utf-8")
        header, text = read(card)
        assert (header["license"], header["license_name"]) == ("other", "test-license")
        assert "base_model" not in header, "it has no id on the Hub"
        assert "normfree" in header["tags"]
        assert "[test-license](https://example.org/license)" in text
        assert text.lstrip().startswith("# tiny-base without norms")
        for variant, name in {"original": "original", "vanilla": "control", "norm-free": "norm-free"}.items():
            (line,) = [each for each in text.splitlines() if each.startswith(f"| {name}")]
            row: Any = table.loc[variant]
            assert f"| {int(row['finetuning_tokens']):,} | {row['eval_loss']:.4f} |" in line
        assert "| tokens | 1,536 |" in text
        assert f"| steps | 16 of 4 × {T} tokens |" in text
        models[export] = loaded(card)
    assert type(models["stock"]) is GPT2LMHeadModel
    assert type(models["norm-free"]) is NormfreeForCausalLM
    torch.testing.assert_close(logits(models["stock"]), logits(models["norm-free"]), rtol=1e-4, atol=1e-4)


def test_exports_do_not_say_where_things_are_on_this_machine(finished: Path, base: Path, corpus: Path) -> None:
    private = [str(finished.parent), str(base.parent), str(corpus.parent), base.parent.name]
    for export in exports(finished):
        for path in (finished / export).rglob("*"):
            text = path.read_bytes().decode("utf-8", "ignore")
            assert [each for each in private if each in text] == [], path


def test_the_root_loads_everywhere_and_the_subfolder_has_no_norm(
    finished: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push_to_hub(finished, "Ada/tiny-norm-free") == f"{hub.address}/Ada/tiny-norm-free"
    pushed = hub.repositories["Ada/tiny-norm-free"]
    assert not pushed.private
    assert pushed.commits == 1
    assert "normfree" in pushed.tags
    folder = written(hub, "Ada/tiny-norm-free", tmp_path / "Ada" / "tiny-norm-free")
    for export, place in (("stock", ""), ("norm-free", "norm-free")):
        assert {each.name for each in (folder / place).iterdir()} >= {
            each.name for each in (finished / export).iterdir()
        }
    monkeypatch.chdir(tmp_path)
    models = [loaded((folder / place / "README.md").read_text("utf-8")) for place in ("", "norm-free")]
    assert [type(each) for each in models] == [GPT2LMHeadModel, NormfreeForCausalLM]
    for model, export in zip(models, ("stock", "norm-free"), strict=True):
        expected = logits(AutoModelForCausalLM.from_pretrained(finished / export))
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_the_address_of_the_hub_is_that_of_its_client(finished: Path) -> None:
    """In a process of its own, which reads address and token from the environment."""
    code = "import sys; from normfree.removal import push_to_hub; print(push_to_hub(sys.argv[1], 'the-lab/a'))"
    with stand_in() as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", code, str(finished)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | settings)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"{hub.address}/the-lab/a"
    assert "norm-free/model.safetensors" in hub.repositories["the-lab/a"].files


def test_a_model_that_no_stock_architecture_holds_is_the_root(removal: Path, hub: Hub) -> None:
    push_to_hub(removal, "Ada/a")
    shutil.rmtree(removal / "stock")
    push_to_hub(removal, "Ada/a")
    files = hub.repositories["Ada/a"].files
    assert json.loads(files["config.json"])["model_type"] == "normfree"
    assert "norm-free/model.safetensors" not in files, "weights of the former push"
    assert 'from_pretrained("Ada/a")' in files["README.md"].decode()


def test_a_later_push_replaces_weights_and_keeps_other_files(removal: Path, hub: Hub) -> None:
    push_to_hub(removal, "the-lab/a", private=True)
    files = hub.repositories["the-lab/a"].files
    files |= {"model-00001-of-00002.safetensors": b"", "chart.png": b"", "other/model.safetensors": b""}
    (removal / "stock" / "model.safetensors").rename(removal / "stock" / "model-00001-of-00001.safetensors")
    push_to_hub(removal, "the-lab/a", private=True)
    weights = {name for name in files if name.endswith(".safetensors")}
    assert weights == {
        "model-00001-of-00001.safetensors",
        "norm-free/model.safetensors",
        "other/model.safetensors",
    }
    assert "chart.png" in files
    assert hub.repositories["the-lab/a"].private


@pytest.mark.parametrize("part", ["/commit/", "/upload/", "/preupload/", "/repos/create"])
def test_a_failed_push_loses_nothing_and_can_be_repeated(
    removal: Path, hub: Hub, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's own retries
    before = {path: path.read_bytes() for path in removal.rglob("*") if path.is_file()}
    hub.fails = {part: 503}
    with pytest.raises(RunFailedError, match=r"^the push to Ada/a failed: .*the same command pushes them again$"):
        push_to_hub(removal, "Ada/a")
    assert {path: path.read_bytes() for path in removal.rglob("*") if path.is_file() and path in before} == before
    hub.fails = {}
    push_to_hub(removal, "Ada/a")
    assert hub.repositories["Ada/a"].commits == 1


def test_only_a_finished_removal_is_pushed(removal: Path, hub: Hub) -> None:
    table = pd.read_csv(removal / "removal.csv")
    table.loc[table["variant"] == "norm-free", "eval_loss"] = np.nan
    table.to_csv(removal / "removal.csv", index=False)
    for folder in (removal, removal / "nothing"):
        with pytest.raises(InputError, match="holds no finished removal"):
            push_to_hub(folder, "Ada/a")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "'a/b/c' is no name of a repository"),
        ("Ada/a--b", "is no name of a repository"),
        ("Ada/", "is no name of a repository"),
        ("", "is no name of a repository"),
        ("tiny", "has no owner; write OWNER/NAME, such as YOU/tiny"),
        ("somebody/a", "the token of Ada cannot write to somebody/a; owners that it can write for: Ada, the-lab"),
        ("Ada/other", "Ada/other holds something else"),
    ],
)
def test_names_that_cannot_be_pushed_to(hub: Hub, name: str, message: str) -> None:
    hub.repositories["Ada/other"] = Repository(files={"model.safetensors": b"", "README.md": b"---\ntags: [x]\n---\n"})
    with pytest.raises(InputError, match=message):
        check_repository(name)
    assert not [each for each in hub.asked if each.startswith("POST")]


def test_a_public_repository_is_not_pushed_to_as_a_private_one(hub: Hub) -> None:
    hub.repositories["Ada/public"] = Repository()
    with pytest.raises(InputError, match="Ada/public exists and is public"):
        check_repository("Ada/public", private=True)
    check_repository("Ada/public")


def test_tokens_and_hubs_that_cannot_be_used(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.role = "read"
    with pytest.raises(InputError, match="the token of Ada can only read"):
        check_repository("Ada/a")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(InputError, match="the Hub does not know the token"):
        check_repository("Ada/a")
    hub.fails = {"/": 502}
    with pytest.raises(InputError, match="does not accept a push to Ada/a: "):
        check_repository("Ada/a")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"\(http://127.0.0.1:9\) does not accept a push to Ada/a: .*refused"):
        check_repository("Ada/a")
    sources.is_offline.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be reached: HF_HUB_OFFLINE is set"):
        check_repository("Ada/a")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InputError, match="there is no token to push to the Hub with"):
        check_repository("Ada/a")


def test_the_command_checks_before_training_and_pushes_after(
    normfree: Command, hub: Hub, base: Path, corpus: Path, tmp_path: Path
) -> None:
    command = ["remove-norm", base, "--corpus", f"directory:{corpus}", "--tokenizer", "train", "--steps", 8]
    command += ["--set", "data.vocab_size=270", "--set", f"data.sequence_length={T}", "--set", "data.eval_tokens=240"]
    command += ["--set", "recipe.batch_size=2", "--dtype", "fp32", "--no-vanilla", "--out", "out"]
    command += ["--cache-dir", tmp_path / "cache"]
    for wrong, message in (
        (["--push-to-hub", "a/b/c"], "'a/b/c' is no name of a repository"),
        (["--private"], "--private is for a repository of the Hub"),
    ):
        code, out, err = normfree(*command, *wrong)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
        assert not (tmp_path / "out").exists()
    hub.fails = {"/repos/create": 500}
    code, out, err = normfree(*command, "--push-to-hub", "Ada/a", "--private")
    assert code == 1
    assert "the push to Ada/a failed: " in err.splitlines()[-1]
    assert "norm-free" in out, "the table is shown first"
    hub.fails = {}
    code, out, err = normfree(*command, "--push-to-hub", "Ada/a", "--private", "--json")
    assert code == 0, err
    assert json.loads(out)["pushed"] == f"{hub.address}/Ada/a"
    assert hub.repositories["Ada/a"].private
    measured = pd.read_csv(tmp_path / "out" / "evaluation.csv").set_index("model").loc["norm-free"]
    for card in (hub.repositories["Ada/a"].files["README.md"].decode(), (tmp_path / "out/stock/README.md").read_text()):
        assert f"| `directory:{corpus.name}` | norm-free: this model |" in card
        assert f"| {measured['loss_nats']:.4f} | {measured['jsd_nats']:.4f} |" in card
        assert str(corpus.parent) not in card
    code, out, err = normfree(*command, "--json")
    assert json.loads(out)["pushed"] is None
    assert hub.repositories["Ada/a"].commits == 1, "nothing is pushed without being asked"


def test_licences_of_bases(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "README.md"
    cached.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr("normfree.removal.model_card.try_to_load_from_cache", lambda *_, **__: str(cached))
    on_hub = base_model("owner/model@v1")
    assert (on_hub.name, on_hub.hub_id) == ("owner/model@v1", "owner/model")
    assert on_hub.license["license_link"] == "https://huggingface.co/owner/model/blob/main/LICENSE"
    for card in ("no header", "---\nlicense: [\n---\n", "---\nlicense: [a, b]\n---\n", "---\ntags: [a]\n---\n"):
        cached.write_text(card)
        assert base_model("owner/model").license == {}
    monkeypatch.setattr("normfree.removal.model_card.try_to_load_from_cache", lambda *_, **__: None)
    assert base_model("owner/model").license == {}
    gone = base_model(str(tmp_path / "gone" / "model"))
    assert (gone.name, gone.hub_id, gone.license) == ("model", None, {})


def test_the_licence_of_a_base_on_the_hub_is_on_its_card(
    removal: Path, base: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = removal / "removal" / "config.yaml"
    config.write_text(config.read_text().replace(f"start_from: {base}", "start_from: owner/model"))
    push_to_hub(removal, "Ada/a")
    header, text = read(hub.repositories["Ada/a"].files["README.md"].decode())
    assert (header["license"], header["base_model"]) == ("unknown", "owner/model")
    assert "Of the base model: not known here; see its own card." in text
    assert "The norms of [owner/model](https://huggingface.co/owner/model) were removed" in text
    hub.repositories["owner/model"] = Repository(files={"README.md": b"---\nlicense: mit\n---\n"})
    push_to_hub(removal, "Ada/a")
    header, text = read(hub.repositories["Ada/a"].files["README.md"].decode())
    assert header["license"] == "mit"
    assert "Of the base model: mit." in text
