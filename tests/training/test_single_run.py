"""A run from its file and a fine-tuning, as a notebook calls them: without a console, with data to go on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.training import RunResult
from normfree.training.single_run import finetune, train_file

Normfree = Callable[..., tuple[int, str, str]]


def test_a_file_is_trained_with_the_tokens_of_the_run_it_is_from(
    plain_run: RunResult,
    data: PackedData,
    normfree: Normfree,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = train_file(plain_run.folder / "config.yaml", tmp_path / "again", cache_dir=data.folder.parent)
    assert capsys.readouterr().out == ""
    assert again.row["eval_loss"] == plain_run.row["eval_loss"]
    assert again.row["configuration"] == "SM+LN+G"
    code, out, err = normfree("train", plain_run.folder / "config.yaml", "--out", tmp_path / "again", "--json")
    assert code == 0, err
    assert json.loads(out) == {"folder": str(tmp_path / "again"), **again.row}


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        train_file(tmp_path / "nowhere.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finetuning_returns_what_it_trained_on(plain_run: RunResult, tmp_path: Path) -> None:
    pairs = ({"prompt": f"def f{i}(x):", "completion": f"\n    return x + {i}\n"} for i in range(60))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    changes = {"data.corpus": f"pairs:{tmp_path / 'pairs.jsonl'}", "data.eval_fraction": 0.2, "recipe.steps": 2}
    tuned = finetune(str(plain_run.folder), tmp_path / "tuned", changes=changes, cache_dir=tmp_path / "cache")
    assert (tuned.run.row["configuration"], tuned.run.row["status"]) == ("finetuned", "finished")
    assert tuned.run.folder == tmp_path / "tuned"
    assert (tuned.beginning.tokens, tuned.quantization) == ((), None)
