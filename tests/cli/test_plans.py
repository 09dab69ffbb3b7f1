"""Plans that commands show before long work: of a study, and of a removal, which more than a day needs consent for."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from normfree.data import train_tokenizer
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.removal import from_pretrained
from normfree.removal.plan import CPU_BATCH, CPU_LENGTH, PUBLISHED_BATCH, PUBLISHED_LENGTH, plan
from normfree.removal.schedule import load_schedule
from normfree.runner.study_plan import plan_study

Normfree = Callable[..., tuple[int, str, str]]
SMALL = {"data.sequence_length": 16, "data.eval_tokens": 320, "recipe.batch_size": 4}


@pytest.fixture
def model(corpus_folder: Path, tmp_path: Path) -> Path:
    """A pretrained model with its tokenizer, that is no run."""
    torch.manual_seed(0)
    path = tmp_path / "pretrained"
    tokenizer = train_tokenizer((each.read_text() for each in sorted(corpus_folder.iterdir())), 290)
    tokenizer.save_pretrained(path)
    options: dict[str, Any] = {"norm": "layernorm", "bos_token_id": 0, "eos_token_id": 0}
    config = NormfreeConfig(vocab_size=290, n_layer=2, n_head=2, n_embd=16, n_positions=2048, **options)
    NormfreeForCausalLM(config).save_pretrained(path)
    return path


def test_the_plan_of_a_study_is_what_it_trains(normfree: Normfree, preset_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ("study", "relu-revival", "--preset", preset_file, "--plan", "--seeds", "0,1", "--only", "SM+G")
    code, out, error = normfree(*options, "--json")
    assert code == 0, error
    found = pd.DataFrame(json.loads(out)["runs"])
    assert found["configuration"].tolist() == ["SM+LN+G", "SM+G"]
    assert found["n_run"].tolist() == [2, 2]
    assert json.loads(out)["seconds"] == pytest.approx(found["seconds"].sum())
    assert (found["seconds"] > 0).all()
    untimed = plan_study("relu-revival", preset_file, only=["SM+G"], seeds=[0, 1], timed=False)
    assert untimed["seconds"].isna().all()
    same = [column for column in untimed if column != "seconds"]
    pd.testing.assert_frame_equal(untimed[same], found[same])
    code, out, error = normfree(*options)
    assert code == 0, error
    assert "4 runs, about " in out
    assert "SM+LN+G" in out
    assert sorted(tmp_path.rglob("*")) == before
    code, out, error = normfree("study", "relu-revival", "--preset", preset_file, "--only", "SM+G", "--out", "s")
    assert code == 0, error
    report = html.unescape((tmp_path / "s" / "report.html").read_text())
    assert f"normfree study relu-revival --preset {preset_file} --out s --only SM+G" in report
    results = pd.read_csv(tmp_path / "s" / "results.csv").set_index("configuration")
    for row in untimed.to_dict("records"):
        trained = results.loc[row["configuration"]]
        assert (trained["steps"], trained["tokens"], trained["n_parameters"]) == (
            *(row["steps"], row["tokens"], row["parameters"]),
        )


def test_a_plan_refuses_what_the_study_refuses(normfree: Normfree, preset_file: Path) -> None:
    for words, message in (
        (("no-such-study",), "unknown study"),
        (("relu-revival", "--only", "SM+X"), "unknown configuration"),
        (("relu-revival", "--seeds", "0,0"), "seeds must be different"),
        (("relu-revival", "--set", "recipe.lr=3"), "learning_rate"),
    ):
        code, out, error = normfree("study", *words, "--preset", preset_file, "--plan")
        assert (code, out) == (2, "")
        assert message in error


def test_a_removal_of_days_is_refused_until_it_is_agreed_to(
    normfree: Normfree, model: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_pretrained, "SHORT_OPERATIONS", 0.0)
    monkeypatch.setattr(from_pretrained, "seconds_a_step", lambda *_: 5_000.0)
    command = ("remove-norm", model, "--corpus", corpus_folder, "--out", "removal", "--cache-dir", tmp_path / "cache")
    budget = ("--steps", "20", *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")))
    code, out, error = normfree(*command, *budget)
    assert code == 2
    assert "Plan: 20 steps of 4 x 16 tokens = 1,280 tokens, " in out
    assert "Training takes about 2 d 7 h" in out
    assert error.startswith("normfree: this takes about 2 d 7 h on cpu (2,560 tokens); give --yes to begin it, or a ")
    assert error.count("\n") == 1
    assert not (tmp_path / "removal").exists()
    code, out, error = normfree(*command, *budget, "--yes")
    assert code == 0, error
    # What has begun was agreed to.
    code, out, error = normfree(*command, *budget)
    assert code == 0, error
    assert "Plan:" not in out


def test_a_removal_of_less_than_a_day_begins(
    model: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_pretrained, "SHORT_OPERATIONS", 0.0)
    monkeypatch.setattr(from_pretrained, "seconds_a_step", lambda *_: 4_000.0)
    changes = {"data.corpus": f"directory:{corpus_folder}", "recipe.steps": 20, **SMALL}
    options: dict[str, Any] = {"changes": changes, "cache_dir": tmp_path / "cache"}
    with pytest.raises(InputError, match="give --yes"):
        from_pretrained.remove_from_pretrained(str(model), tmp_path / "both", **options)
    found = from_pretrained.remove_from_pretrained(str(model), tmp_path / "one", vanilla=False, **options)
    assert found.result.norm_free.exists()
    taught = load_schedule(str(tmp_path / "one" / "schedule.yaml")).model_dump() | {"distillation_weight": 1.0}
    (tmp_path / "taught.yaml").write_text(json.dumps(taught))
    options |= {"vanilla": False, "schedule": str(tmp_path / "taught.yaml")}
    with pytest.raises(InputError, match="about 1 d 5 h on cpu"):
        from_pretrained.remove_from_pretrained(str(model), tmp_path / "taught", **options)


def test_the_default_budget_fits_a_cpu_and_a_published_schedule_is_as_published(
    model: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"data.corpus": f"directory:{corpus_folder}"}
    on_cpu = plan(str(model), changes=changes, seed=0).run
    assert on_cpu.recipe.model_dump().items() >= CPU_BATCH.items()
    assert on_cpu.data.sequence_length == CPU_LENGTH
    published = plan(str(model), changes=changes, seed=0, schedule=load_schedule("gpt2")).run
    assert published.recipe.batch_size == PUBLISHED_BATCH["batch_size"]
    assert published.data.sequence_length == PUBLISHED_LENGTH
    monkeypatch.setattr("normfree.removal.plan.default_device", lambda: torch.device("cuda"))
    on_gpu = plan(str(model), changes=changes, seed=0).run
    assert on_gpu.recipe.model_dump().items() >= PUBLISHED_BATCH.items()
    assert on_gpu.data.sequence_length == PUBLISHED_LENGTH
