from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from normfree.errors import InputError
from normfree.training import RunConfig, load_run_config
from normfree.training.run_config import read_yaml


@pytest.fixture
def file(tmp_path: Path, tiny_run: Callable[..., RunConfig]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(tiny_run().to_yaml({"versions": {}}))
    return path


def edited(file: Path, *keys: str, value: object) -> Path:
    content = yaml.safe_load(file.read_text())
    section = content
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_run_reads_back_as_it_was_written(file: Path, tiny_run: Callable[..., RunConfig]) -> None:
    assert load_run_config(file) == tiny_run()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("recipe", "learning_rte"),
            0.1,
            r"unknown option 'recipe.learning_rte' \(did you mean 'recipe.learning_rate'",
        ),
        (("recipe", "learning_rate"), -1, "recipe.learning_rate: Input should be greater than 0"),
        (("data", "cut"), "slices", "data.cut: Input should be 'chunks' or 'packed'"),
        (("seed",), "one", "seed: Input should be a valid integer"),
        (("seeds",), [1], "unknown option 'seeds'"),
        (("recipe",), "fast", "recipe: Input should be a valid dictionary"),
    ],
)
def test_mistakes_are_named_with_their_place(file: Path, keys: tuple[str, ...], value: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_run_config(edited(file, *keys, value=value))
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not valid YAML at line 1"),
        (b"- a list", "must hold a YAML mapping"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"model: !!python/object/apply:os.system ['true']", "not valid YAML at line 1"),
        (b"", "must hold a YAML mapping"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_yaml(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"cannot read .*it is a folder, not a regular file"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("option", ["vocab_size", "n_positions", "eos_token_id"])
def test_what_the_data_decide_may_not_stand_in_the_model(tiny_run: Callable[..., RunConfig], option: str) -> None:
    with pytest.raises(InputError, match=f"model.{option} is decided by the data"):
        tiny_run(model={option: 7}).build_model_config(290)


def test_the_model_gets_vocabulary_and_length_from_the_data(tiny_run: Callable[..., RunConfig]) -> None:
    config = tiny_run().build_model_config(290, eos_token_id=3)
    assert (config.vocab_size, config.n_positions, config.eos_token_id) == (290, 16, 3)


@pytest.mark.parametrize("options", [{"decay_steps": 7}, {"decay_steps": 8, "warmup_steps": 8}])
def test_a_decay_does_not_end_before_the_budget_or_the_warmup(
    tiny_run: Callable[..., RunConfig], options: dict[str, int]
) -> None:
    with pytest.raises(InputError, match=rf"recipe.decay_steps is {options['decay_steps']}, before the end"):
        tiny_run(steps=8, **options).recipe.check(16)
