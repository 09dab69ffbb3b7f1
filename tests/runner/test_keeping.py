"""What is kept of a study without its checkpoints: its report is the same, and more seeds can be trained in a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from normfree import run_study
from normfree.errors import InputError
from normfree.runner import keep_tables, load_study

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def study(preset_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    run_study("relu-revival", preset_file, out=folder, cache_dir=tmp_path / "cache", progress=False)
    return folder


def test_kept_tables_make_the_same_report(study: Path, normfree: Command, tmp_path: Path) -> None:
    code, out, err = normfree("report", study, "--keep", "kept")
    assert code == 0, err
    assert "runs added: 4" in out
    kept = tmp_path / "kept"
    names = {path.name for path in kept.rglob("*") if path.is_file()}
    tables = {"results.csv", "config.yaml", *(f"{each}.parquet" for each in ("metrics", "layers", "head_entropy"))}
    assert names == tables | {"sequence_losses.parquet", "study.yaml", "commands.yaml"}
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) < 4 * 60_000
    assert normfree("report", "kept")[0] == 0
    for name in ("results.csv", "report.html"):
        assert (kept / name).read_bytes() == (study / name).read_bytes(), name
    for name in ("head_entropy", "layer_entropy", "eval_curve"):
        pd.testing.assert_frame_equal(getattr(load_study(kept), name), getattr(load_study(study), name))


def test_more_runs_are_trained_in_a_copy_and_added(study: Path, preset_file: Path, tmp_path: Path) -> None:
    kept, again = tmp_path / "kept", tmp_path / "again"
    assert keep_tables(study, kept) == 4
    shutil.copytree(kept, again)
    options = {"out": again, "cache_dir": tmp_path / "cache", "progress": False}
    run_study("relu-revival", preset_file, seeds=(0, 1), **options)  # type: ignore[arg-type]
    assert len(list(again.glob("runs/*/*/checkpoint-*"))) == 2 * 4, "of the new seed alone"
    before = {path: path.read_bytes() for path in kept.rglob("runs/*/seed-0/*")}
    assert keep_tables(again, kept) == 4
    assert keep_tables(again, kept) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert len(load_study(kept).results) == 8


def test_another_study_or_corpus_is_refused(
    study: Path, preset_file: Path, tmp_path: Path, corpus_folder: Path
) -> None:
    kept = tmp_path / "kept"
    keep_tables(study, kept)
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    changed = study / "study.yaml"
    original = changed.read_text()
    fingerprint = next(line for line in original.splitlines() if line.startswith("corpus_fingerprint"))
    changed.write_text(original.replace(fingerprint, "corpus_fingerprint: another"))
    with pytest.raises(InputError, match="the same study on another corpus"):
        keep_tables(study, kept)
    changed.write_text(original.replace("n_embd: 16", "n_embd: 32"))
    with pytest.raises(InputError, match="holds another study"):
        keep_tables(study, kept)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_a_collection_is_kept_with_its_studies(preset_content: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**preset_content, "columns": ["tiny.yaml"]}))
    folder, kept = tmp_path / "table", tmp_path / "kept"
    run_study("table-2", path, out=folder, cache_dir=tmp_path / "cache", progress=False)
    assert keep_tables(folder, kept) == 4
    assert load_study(kept).table.equals(load_study(folder).table)


def test_of_removals_what_the_report_reads_is_kept(
    preset_content: dict[str, Any], normfree: Command, tmp_path: Path
) -> None:
    recipe = {**preset_content["recipe"], "steps": 12, "eval_steps": 12, "save_steps": 12}
    path = tmp_path / "tiny.yaml"
    removal = {"budget_shares": [1.0], "learning_rates": [1e-3]}
    path.write_text(yaml.safe_dump({**preset_content, "recipe": recipe, "removal": removal}))
    code, _, err = normfree("study", "norm-removal", "--preset", path, "--out", "study", "--only", "GPT-2 style")
    assert code == 0, err
    kept = tmp_path / "kept"
    assert keep_tables(tmp_path / "study", kept) == 1
    nested = {each.name for each in kept.rglob("removals/**/*") if each.is_file()}
    assert nested == {"removal.csv", "schedule.yaml", "metrics.parquet", "removal.json"}
    assert normfree("report", "kept")[0] == 0
    assert (kept / "report.html").read_bytes() == (tmp_path / "study" / "report.html").read_bytes()
    texts = [each.read_text() for kind in ("*.yaml", "*.csv", "*.json") for each in kept.rglob(kind)]
    assert not [text for text in texts if str(tmp_path / "study") in text], "where it was trained is no part of it"
