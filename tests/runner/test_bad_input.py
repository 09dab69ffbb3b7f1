"""Bad input gives one line that names the mistake, exit code 2, and leaves every file as it was."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Command = Callable[..., tuple[int, str, str]]


def files_in(folder: Path) -> dict[Path, bytes]:
    cache = folder / "cache"
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and cache not in path.parents}


def assert_refused(command: Command, folder: Path, *arguments: object, says: str) -> None:
    before = files_in(folder)
    code, out, err = command(*arguments)
    assert code == 2, (out, err)
    assert err.startswith("normfree: ")
    assert err.count("\n") == 1
    assert says in err
    assert "Traceback" not in out + err
    assert files_in(folder) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("study", "relu-reviva"), "unknown study 'relu-reviva' (did you mean 'relu-revival'?)"),
        (("study", "relu-revival", "--preset", "gpuu"), "unknown preset 'gpuu' (did you mean 'gpu'?)"),
        (("study", "relu-revival", "--preset", "none.yaml"), "cannot read none.yaml: No such file or directory"),
        (("study", "relu-revival", "--presett", "cpu"), "--set) (see: normfree study --help)"),
        (("bench", "trainng"), "'trainng'. Did you mean 'training'? (see: normfree bench --help)"),
        (("studdy",), "No such command 'studdy'. Did you mean 'study'? (see: normfree --help)"),
        (("train", "run.yaml"), "Missing option '--out'. (see: normfree train --help)"),
        (("study",), "name a study; normfree study --list shows them all"),
        (("study", "relu-revival", "--tokens", "many"), "Invalid value for '--tokens'"),
        (("study", "relu-revival", "--tokens", "9", "--steps", "9"), "give --tokens or --steps, not both"),
        (("study", "relu-revival", "--seeds", "one"), "--seeds 'one' is not a comma-separated list"),
        (("study", "relu-revival", "--seeds", "1,1"), "seeds must be different"),
        (("study", "relu-revival", "--seeds=-1"), "seeds must be different numbers from 0"),
        (("study", "relu-revival", "--set", "n_layer"), "is not of the form NAME=VALUE"),
        (("study", "relu-revival", "--set", "model.n_layer=[1"), "is not a YAML value"),
        (("study", "relu-revival", "--only", "SM+LR"), "unknown configuration 'SM+LR'"),
        (("study", "table-2", "--only", "SM+LR"), "unknown configuration 'SM+LR' (did you mean 'SM+R'?)"),
        (("report", "nowhere"), "is no study folder"),
        (("train", "nowhere.yaml", "--out", "run"), "cannot read nowhere.yaml"),
    ],
)
def test_bad_arguments(normfree: Command, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    assert_refused(normfree, tmp_path, *arguments, says=says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.activation=gleu", "unknown activation 'gleu' (did you mean 'gelu'?)"),
        ("model.norm=layrnorm", "unknown norm 'layrnorm' (did you mean 'layernorm'?)"),
        ("model.n_head=3", "n_embd (16) is not divisible by n_head (3)"),
        ("model.activation=[gelu]", "activation lists 1 names for n_layer = 2"),
        ("model.n_layers=3", "unknown model option 'n_layers' (did you mean 'n_layer'?)"),
        ("model.sliding_window=4", "model: sliding_window is not for studies"),
        ("model.n_layer=two", "expected int, got str"),
        ("model.negative_slope=0.1", "negative_slope means nothing for activation"),
        ("model.vocab_size=7", "model.vocab_size is decided by the data"),
        ("recipe.tokens=10", "less than one step"),
        ("recipe.steps=0", "recipe.steps: Input should be greater than or equal to 1"),
        ("recipe.learning_rate=-1", "recipe.learning_rate: Input should be greater than 0"),
        ("recipe.precision=fp8", "recipe.precision"),
        ("recipe.micro_batch_size=3", "batch_size (4) is not a multiple of micro_batch_size (3)"),
        ("recipe.batch_size=4096", "fewer than one batch of 4096"),
        ("data.sequence_length=1", "data.sequence_length"),
        ("data.cut=slices", "data.cut: Input should be 'chunks' or 'packed'"),
        ("data.corpus=directory:nowhere", "nowhere"),
        ("data.corpus=kodeparrot", "kodeparrot"),
        ("data.vocab_size=100000", "use a larger corpus or a vocab_size"),
        ("data.eval_fraction=2", "data.eval_fraction"),
        ("recipe.lr=3", "unknown option 'recipe.lr' (did you mean 'recipe.learning_rate'?)"),
        ("lr=3", "unknown option 'lr' (did you mean 'recipe.learning_rate'?); allowed in recipe: steps, tokens, "),
        ("n_layer=3", "unknown option 'n_layer' (did you mean 'model.n_layer'?); allowed in model: vocab_size, "),
        ("hidden_size=3", "unknown option 'hidden_size' (did you mean 'model.n_embd'?)"),
        ("recipe.bs=4", "did you mean 'recipe.batch_size'"),
        ("recipe.epochs=4", "did you mean 'recipe.tokens'"),
        ("recipe.seq_len=4", "did you mean 'data.sequence_length'"),
        ("data.ctx=4", "did you mean 'data.sequence_length'"),
        ("model.d_model=64", "unknown model option 'd_model' (did you mean 'n_embd'?)"),
        ("recipe.batch_size=many", "recipe.batch_size: Input should be a valid integer"),
        ("recipe.batch_size=0", "recipe.batch_size: Input should be greater than or equal to 1"),
        ("optimizer.name=sgd", "unknown section 'optimizer'"),
    ],
)
def test_bad_values(normfree: Command, preset_file: Path, tmp_path: Path, change: str, says: str) -> None:
    # The configurations of the study choose norm and activation themselves, so those mistakes come by file.
    name, value = change.split("=")
    if name in ("model.activation", "model.norm", "model.negative_slope"):
        content = yaml.safe_load(preset_file.read_text())
        run: dict[str, Any] = {
            "model_name": "tiny",
            "configuration": "mine",
            "model": {**content["model"], name.removeprefix("model."): yaml.safe_load(value)},
            "data": content["data"],
            "recipe": content["recipe"],
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        assert_refused(normfree, tmp_path, "train", tmp_path / "run.yaml", "--out", "run", says=says)
    else:
        arguments = ("study", "relu-revival", "--preset", preset_file, "--out", "study", "--set", change)
        assert_refused(normfree, tmp_path, *arguments, says=says)


def study_on(command: Command, preset_file: Path, tmp_path: Path, corpus: str, *, says: str) -> None:
    arguments = ("study", "relu-revival", "--preset", preset_file, "--out", "study", "--corpus", corpus)
    assert_refused(command, tmp_path, *arguments, says=says)


def test_an_empty_corpus(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    study_on(normfree, preset_file, tmp_path, f"directory:{tmp_path / 'empty'}", says="empty")


def test_a_binary_corpus(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").mkdir()
    for number in range(9):
        (tmp_path / "binary" / f"{number}.bin").write_bytes(bytes(range(256)) * 9 + bytes([number]))
    study_on(normfree, preset_file, tmp_path, f"directory:{tmp_path / 'binary'}", says="binary")


def test_a_corpus_too_small_for_one_batch(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    arguments = ("study", "relu-revival", "--preset", preset_file, "--out", "study", "--set", "data.train_tokens=32")
    assert_refused(normfree, tmp_path, *arguments, says="the training split has 2 sequences, fewer than one batch of 4")


@pytest.mark.parametrize("content", ["model: [", "- 1", "seed: 0", "description: only\nmodel: {}"])
def test_an_unreadable_preset(normfree: Command, tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    assert_refused(normfree, tmp_path, "study", "relu-revival", "--preset", path, says=str(path))


def test_a_folder_that_holds_another_study(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "relu-revival", "--preset", preset_file, "--out", "study")
    assert normfree(*command)[0] == 0
    assert_refused(normfree, tmp_path, *command, "--steps", "5", says="holds another study")


def test_a_corpus_that_changed_and_is_no_longer_cached(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    command = ("study", "relu-revival", "--preset", preset_file, "--out", "study")
    assert normfree(*command)[0] == 0
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    content = yaml.safe_load((tmp_path / "study" / "study.yaml").read_text())
    content["corpus_fingerprint"] = "0123456789abcdef"
    (tmp_path / "study" / "study.yaml").write_text(yaml.safe_dump(content))
    assert_refused(normfree, tmp_path, *command, "--seeds", "1", says="has changed since they were made")


def test_a_folder_that_holds_other_files(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    command = ("study", "relu-revival", "--preset", preset_file, "--out", "thesis")
    assert_refused(normfree, tmp_path, *command, says="is no study folder")


def test_a_damaged_study_file(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_text("study: relu-revival\n")
    assert_refused(normfree, tmp_path, "report", "study", says="study.yaml is damaged")


def test_a_study_without_a_finished_run(normfree: Command, preset_content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    content = {"study": "relu-revival", "preset": "tiny", "corpus_fingerprint": "0" * 16, **preset_content}
    (tmp_path / "study" / "study.yaml").write_text(yaml.safe_dump(content))
    assert_refused(normfree, tmp_path, "report", "study", says="no finished run of SM+LN+G")


def test_a_checkpoint_of_another_configuration(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    assert normfree("study", "relu-revival", "--preset", preset_file, "--out", "study")[0] == 0
    content = yaml.safe_load((tmp_path / "study" / "runs" / "sm-g" / "seed-0" / "config.yaml").read_text())
    content["model"]["n_layer"] = 1
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    run = tmp_path / "study" / "runs" / "sm-g" / "seed-0"
    assert_refused(normfree, tmp_path, "train", tmp_path / "other.yaml", "--out", run, says="model.n_layer: 2 there, 1")


def test_a_process_of_its_own_says_one_line_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "normfree", "study", "relu-revivel"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "did you mean 'relu-revival'" in done.stderr
