"""Files from strangers: nothing in them is run, nothing is written outside the folder that was named."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import normfree as package
from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.training.run_folder import checkpoints
from tests.forked import normfree as command_line

from .crash import Kill, in_child

Command = Callable[..., tuple[int, str, str]]
SOURCES = sorted(Path(package.__file__).parent.rglob("*.py"))
UNPICKLING = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
RUNNING = {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
STUDY_FILES = ("runner", "catalog.py", "exec")
"""The one place that runs code: the file of a study, which the user names."""
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def calls(tree: ast.AST) -> list[tuple[str, dict[str, Any]]]:
    """The dotted name of every call, with its constant keyword arguments."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [(str(each.arg), each.value) for each in node.keywords]
            constants: dict[str, Any] = {name: value.value for name, value in given if isinstance(value, ast.Constant)}
            found.append((ast.unparse(node.func), constants))
    return found


def test_no_source_file_unpickles_or_runs_what_it_reads() -> None:
    assert len(SOURCES) > 100
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in imports for alias in node.names}
        modules |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
        assert not {each.partition(".")[0] for each in modules} & UNPICKLING, path
        for name, constants in calls(tree):
            assert name not in RUNNING or (path.parent.name, path.name, name) == STUDY_FILES, (path, name)
            assert constants.get("weights_only") is True or name != "torch.load", path
            assert constants.get("allow_pickle", False) is False, path
            assert constants.get("trust_remote_code", False) is False, path
            assert constants.get("shell", False) is False, path


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model = NormfreeForCausalLM(NormfreeConfig(vocab_size=270, n_layer=1, n_head=2, n_embd=16, n_positions=16))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_refused(normfree: Command, *arguments: object) -> str:
    code, out, err = normfree(*arguments)
    assert (code, out) == (2, ""), (out, err)
    assert err.startswith("normfree: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_under_any_name(
    normfree: Command, model_folder: Path, tmp_path: Path, name: str
) -> None:
    (model_folder / "model.safetensors").unlink()
    (model_folder / name).write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "bang")}))
    assert "cannot load model" in assert_refused(normfree, "entropy", model_folder, "--corpus", "installed-python")
    assert not (tmp_path / "bang").exists()


def test_a_model_that_wants_its_own_code_is_refused(normfree: Command, model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config["model_type"] = "stranger"
    config["auto_map"] = {"AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model"}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "bomb.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'bang')!r}).touch()")
    assert "cannot load model" in assert_refused(normfree, "entropy", model_folder, "--corpus", "installed-python")
    assert not (tmp_path / "bang").exists()


def test_a_tokenizer_that_wants_its_own_code_is_not_given_it(normfree: Command, run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    auto_map = {"auto_map": {"AutoTokenizer": ["bomb.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    (folder / "bomb.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'bang')!r}).touch()")
    content = yaml.safe_load(run_file.read_text())
    content["data"] = {**content["data"], "tokenizer": str(folder)}
    del content["data"]["vocab_size"]
    run_file.write_text(yaml.safe_dump(content))
    assert "tokenizer" in assert_refused(normfree, "train", run_file, "--out", tmp_path / "run")
    assert not (tmp_path / "bang").exists()


def test_a_pickle_in_a_checkpoint_is_not_run(
    train_command: Callable[[Path], tuple[object, ...]], tmp_path: Path
) -> None:
    """Without a manifest nothing speaks against the file; it is then loaded with ``weights_only=True``."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    in_child(command_line(*train_command(folder)), folder, Kill(before=("os.rename", ".checkpoint-6")))
    checkpoint = checkpoints(folder / "run")[-1]
    (checkpoint / "checkpoint.json").unlink()
    torch.save({"state": Bomb(tmp_path / "bang")}, checkpoint / "optimizer.pt")
    ended = in_child(command_line(*train_command(folder)), folder)
    assert ended.code == 1
    assert "UnpicklingError" in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch bang']", "!!python/name:os.system", "!bang x"]
)
def test_yaml_with_object_tags_is_refused(normfree: Command, run_file: Path, tmp_path: Path, tag: str) -> None:
    run_file.write_text(f"{run_file.read_text()}\nstart_from: {tag}\n")
    assert "is not valid YAML" in assert_refused(normfree, "train", run_file, "--out", tmp_path / "run")
    arguments = ("study", "relu-revival", "--set", f"model.n_layer={tag}", "--out", tmp_path / "study")
    assert "is not a YAML value" in assert_refused(normfree, *arguments)
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("member", ["../elsewhere", "/tmp", ".", "..", "a/b"])
def test_a_collection_cannot_name_folders_outside_of_it(normfree: Command, tmp_path: Path, member: str) -> None:
    (tmp_path / "collection").mkdir()
    content = {"collection": "relu-revival-all", "members": [member]}
    (tmp_path / "collection" / "collection.yaml").write_text(yaml.safe_dump(content))
    assert "names no folder in it" in assert_refused(normfree, "report", tmp_path / "collection")


def test_a_model_name_with_dots_stays_in_the_folder_for_removals(normfree: Command, tmp_path: Path) -> None:
    before = sorted(tmp_path.parent.iterdir())
    assert_refused(normfree, "remove-norm", "../../model", "--corpus", "installed-python")
    assert sorted(tmp_path.parent.iterdir()) == before


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_in_the_names_of_a_study_reaches_its_report_as_text(
    normfree: Command, run_content: dict[str, Any], small_corpus: Path, tmp_path: Path
) -> None:
    hostile_folder = HOSTILE.replace("/", "\N{DIVISION SLASH}")
    corpus = shutil.copytree(small_corpus, tmp_path / hostile_folder)
    preset = {
        "description": HOSTILE,
        "model_name": HOSTILE,
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16},
        "data": {**run_content["data"], "corpus": f"directory:{corpus}"},
        "recipe": {**run_content["recipe"], "steps": 1},
    }
    path = tmp_path / f"{hostile_folder}.yaml"
    path.write_text(yaml.safe_dump(preset))
    assert normfree("study", "relu-revival", "--preset", path, "--out", tmp_path / "study")[0] == 0
    text = (tmp_path / "study" / "report.html").read_text()
    page = Elements(text)
    assert page.text.count("alert(") >= 4
    assert not {tag for tag, _ in page.found} & {"script", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    policies = [each["content"] for tag, each in page.found if each.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])
    sources = [value for _, each in page.found for name, value in each.items() if name in ("src", "href", "action")]
    assert all(re.match(r"data:|#|https://arxiv\.org/abs/[0-9.]+$", str(value)) for value in sources)
