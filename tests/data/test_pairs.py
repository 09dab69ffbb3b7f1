import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from normfree.data import DataConfig, prepare_data
from normfree.errors import InputError

PAIRS = [{"prompt": f"add {a} and {b}:", "completion": f" the sum is {a + b}"} for a in range(12) for b in range(10)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def config(path: Path, **changes: Any) -> DataConfig:
    options = {"corpus": f"pairs:{path}", "vocab_size": 280, "sequence_length": 16, "cut": "packed"}
    return DataConfig.model_validate({**options, "eval_fraction": 0.2, **changes})


def test_only_completions_and_their_ends_are_predicted(tmp_path: Path) -> None:
    data = prepare_data(config(write(tmp_path / "pairs.jsonl", PAIRS)), tmp_path / "cache")
    eos = data.tokenizer.eos_token_id
    n_pairs = 0
    for split in (data.train, data.eval):
        items = [split[index] for index in range(len(split))]
        ids = torch.cat([item["input_ids"] for item in items]).tolist()
        labels = torch.cat([item["labels"] for item in items]).tolist()
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        ends = [place + 1 for place, token in enumerate(ids) if token == eos]
        for start, end in zip([0, *ends], ends, strict=False):
            text = str(data.tokenizer.decode(ids[start : end - 1]))
            said = str(data.tokenizer.decode([label for label in labels[start : end - 1] if label != -100]))
            pair = {"prompt": text.removesuffix(said), "completion": said}
            assert pair in PAIRS
            assert labels[end - 1] == eos
            n_pairs += 1
        predicted = [sum(label != -100 for label in item["labels"][1:].tolist()) for item in items]
        np.testing.assert_array_equal(split.n_predicted(), predicted)
    dropped = sum(data.statistics[name]["dropped_tokens"] for name in ("train", "eval"))
    assert n_pairs >= len(PAIRS) - 2
    assert dropped < 32


def test_plain_blocks_predict_all_but_their_first_token(data: Any) -> None:
    np.testing.assert_array_equal(data.eval.n_predicted(), data.eval.sequence_length - 1)


def test_the_splits_share_no_pair_and_a_cap_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    data = prepare_data(config(path, train_tokens=100), tmp_path / "cache")
    assert len(data.train) == 100 // 16
    texts = [str(data.tokenizer.decode(split.tokens.ravel())) for split in (data.train, data.eval)]
    prompts = [set(each.split("<|endoftext|>")[:-1]) for each in texts]
    assert not prompts[0] & prompts[1]


def test_workers_get_the_same_labels(tmp_path: Path) -> None:
    data = prepare_data(config(write(tmp_path / "pairs.jsonl", PAIRS)), tmp_path / "cache")
    again = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(again[1]["labels"], data.train[1]["labels"])
    assert (again[1]["labels"] == -100).any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"line 1: not JSON"),
        ([PAIRS[0], {"prompt": "x"}], r"line 2: give an object with the texts prompt and completion"),
        ([{"prompt": 1, "completion": "y"}], r"line 1: give an object"),
        ([{"prompt": "x", "completion": ""}], r"line 1: the completion is empty"),
        ([], r"no document that can be used"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_data(config(write(tmp_path / "pairs.jsonl", rows)), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_missing_file_and_a_cut_that_drops_pairs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*none\.jsonl"):
        prepare_data(config(tmp_path / "none.jsonl"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"set data\.cut to packed"):
        prepare_data(config(write(tmp_path / "pairs.jsonl", PAIRS), cut="chunks"), tmp_path / "cache")
    with pytest.raises(ValidationError, match="cut"):
        config(tmp_path, cut="padded")
