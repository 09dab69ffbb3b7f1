import pytest
from pydantic import ValidationError

from normfree.data import DataConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_lenght": 64}, "Extra inputs"),
        ({"tokenizer": "gpt2", "vocab_size": 4096}, "brings its own vocabulary"),
        ({"train_tokens": 127}, "train_tokens is 127, less than one sequence"),
        ({"eval_tokens": 100, "sequence_length": 101}, "eval_tokens is 100, less than one sequence"),
        ({"vocab_size": 256}, "greater than or equal to 257"),
        ({"cut": "sliding"}, "'chunks' or 'packed'"),
        ({"eval_fraction": 0.0}, "greater than 0"),
        ({"eval_fraction": 1.0}, "less than 1"),
        ({"sequence_length": 1}, "greater than or equal to 2"),
        ({"corpus": ""}, "at least 1 character"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("fields", [{}, {"tokenizer": "gpt2"}, {"vocab_size": 300, "train_tokens": 1000}])
@pytest.mark.parametrize("mode", ["python", "json"])
def test_a_dumped_config_reads_back(fields, mode):
    config = DataConfig(**fields)
    assert DataConfig.model_validate(config.model_dump(mode=mode)) == config
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
