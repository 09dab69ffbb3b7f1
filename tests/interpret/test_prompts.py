from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.interpret import induction_pairs, read_prompts


def test_induction_prompts_end_as_they_once_went_on() -> None:
    sequences = torch.randint(40, (30, 24), generator=torch.Generator().manual_seed(0))
    pairs = induction_pairs(sequences, 20, seed=3)
    assert pairs.clean.shape == pairs.corrupted.shape == (20, 13)
    for clean, corrupted, answer, wrong in zip(
        *(each.tolist() for each in (pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers)), strict=True
    ):
        *text, last = clean
        assert text.count(last) == 1
        place = text.index(last)
        assert text[place + 1] == answer
        assert corrupted == [*text[: place + 1], wrong, *text[place + 2 :], last]
        assert wrong not in text
    again = induction_pairs(sequences, 20, seed=3)
    assert torch.equal(again.clean, pairs.clean)


def test_too_few_sequences_are_named() -> None:
    with pytest.raises(InputError, match="2 sequences of 24 tokens give 0 induction prompts, not 1"):
        induction_pairs(torch.zeros(2, 24, dtype=torch.int64), 1)


def line(**changes: Any) -> str:
    return json.dumps({"clean": "a b", "corrupted": "b a", "answer": "a", "wrong_answer": "b"} | changes)


def test_prompts_of_ones_own(data: PackedData, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line() + "\n" + line(clean="b b") + "\n")
    pairs = read_prompts(path, data.tokenizer)
    a, b = (data.tokenizer(each)["input_ids"] for each in ("a", "b"))
    assert pairs.clean.tolist() == [data.tokenizer(each)["input_ids"] for each in ("a b", "b b")]
    assert [pairs.answers.tolist(), pairs.wrong_answers.tolist()] == [a * 2, b * 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ("{", "line 1: not JSON"),
        (line(answer=3), "line 1: each line is an object with the texts clean, corrupted, answer, wrong_answer"),
        (line(answer="a b c d"), r"line 1: answer 'a b c d' is \d+ tokens; give one token"),
        (line(corrupted="a b c d e"), "line 1: corrupted has .* tokens and the first prompt"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(text: str, message: str, data: PackedData, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(path, data.tokenizer)
    with pytest.raises(InputError, match="cannot read prompts"):
        read_prompts(tmp_path / "none.jsonl", data.tokenizer)
