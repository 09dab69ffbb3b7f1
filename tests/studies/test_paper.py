"""Table 2 in full, and the whole paper, from one command each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from normfree import load_study
from normfree.runner import load_preset, preset_names
from normfree.studies.paper import FIGURES

Command = Callable[..., tuple[int, str, str]]
LABELS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]


@pytest.fixture
def columns(preset_content: dict[str, Any], tmp_path: Path) -> Path:
    """A preset of two columns: learned and rotary positions."""
    recipe = {**preset_content["recipe"], "steps": 2, "eval_steps": 1, "save_steps": 1}
    short = {**preset_content, "recipe": recipe, "columns": ["tiny.yaml", "rotary.yaml"]}
    rotary = {
        **short,
        "model_name": "tiny rotary",
        "published": {"model": "Pythia-70M", "context_length": 256},
        "model": {**short["model"], "position": "rotary", "parallel_residual": True, "tie_word_embeddings": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(short))
    (tmp_path / "rotary.yaml").write_text(yaml.safe_dump(rotary))
    return tmp_path / "tiny.yaml"


def test_table_2_has_every_column_with_its_published_one(normfree: Command, columns: Path, tmp_path: Path) -> None:
    code, out, err = normfree("study", "table-2", "--preset", columns, "--out", "table", "--seeds", "1")
    assert code == 0, err
    command = f"normfree study table-2 --preset {columns} --out table --seeds 1"
    for report in (tmp_path / "table").glob("**/report.html"):  # of the collection and of its two studies
        assert command in report.read_text(encoding="utf-8")
    table = pd.read_csv(tmp_path / "table" / "results.csv")
    assert table["configuration"].tolist() == LABELS * 2
    assert table["model"].tolist() == ["tiny"] * 4 + ["tiny rotary"] * 4
    assert table["published_ppl"].tolist() == [2.688, 2.757, 3.197, 2.936, 3.054, 3.107, 3.570, 3.273]
    assert (table["seeds"] == 1).all()
    for column, model in (("tiny", "tiny"), ("rotary", "tiny rotary")):
        own = pd.read_csv(tmp_path / "table" / column / "results.csv")
        assert set(own["model"]) == {model}
        assert table.loc[table["model"] == model, "eval_ppl"].tolist() == own["eval_ppl"].tolist()
        assert set(own["seed"]) == {1}
        assert (tmp_path / "table" / column / "report.html").exists()
    page = (tmp_path / "table" / "report.html").read_text()
    assert "tiny rotary, T = 16" in page
    assert "3.270" in page or "3.273" in page
    assert "tiny rotary" in out

    study = load_study("table")
    pd.testing.assert_frame_equal(study.results, table, check_dtype=False)
    assert study.results is study.table
    assert list(study.studies) == ["tiny", "rotary"]
    assert set(study.head_entropy["model"]) == {"tiny", "tiny rotary"}
    assert {"tiny/headwise-entropy", "rotary/headwise-entropy"} <= set(study.figures)
    assert len(study.studies["rotary"].results) == 4
    assert repr(study).startswith("StudyResult(table-2: preset tiny, rotary; 8 configurations, 8 runs; lowest loss")
    assert study._repr_html_().count("<tr") == 1 + 8

    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("model.safetensors")}
    code, again, err = normfree("report", "table", "--json")
    assert code == 0, err
    assert [row["configuration"] for row in json.loads(again)["table"]] == LABELS * 2
    assert normfree("study", "table-2", "--preset", columns, "--out", "table", "--seeds", "1")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


def test_one_command_makes_the_whole_paper(normfree: Command, columns: Path, tmp_path: Path) -> None:
    code, _, err = normfree("study", "relu-revival", "--all", "--preset", columns, "--out", "all")
    assert code == 0, err
    assert len(pd.read_csv(tmp_path / "all" / "results.csv")) == 8
    labels = {each.label for each in FIGURES.configurations(load_preset(str(columns)))}
    assert set(pd.read_csv(tmp_path / "all" / "tiny" / "results.csv")["configuration"]) == labels
    figures = {path.stem for path in (tmp_path / "all" / "tiny" / "figures").rglob("*.pdf")}
    assert {"headwise-entropy", "entropy-distribution", "evaluation-loss", "negative-slopes"} <= figures
    assert {"layerwise-entropy-six", "trajectory-distance"} <= figures
    # SM+R stands in all three studies and is trained once.
    assert len(list((tmp_path / "all" / "tiny" / "runs").glob("sm-r"))) == 1


def test_every_scale_has_the_three_columns_of_the_paper() -> None:
    scales = {tuple(load_preset(name).columns) for name in preset_names()} - {()}
    assert len(scales) == 3
    for names in scales:
        published = [load_preset(name).published for name in names]
        assert [(each.model, each.context_length) for each in published if each] == [
            ("GPT-2", 128),
            ("Pythia-70M", 128),
            ("Pythia-70M", 256),
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table-2", "--preset", "smoke"), "names no columns"),
        (("learnable-slopes", "--all"), "--all is for relu-revival"),
        (("tabel-2",), "did you mean 'table-2'"),
    ],
)
def test_bad_requests_are_one_line(normfree: Command, words: tuple[str, ...], message: str) -> None:
    code, _, err = normfree("study", *words, "--out", "none")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("none").exists()


def test_a_folder_with_something_else_is_refused(normfree: Command, columns: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, err = normfree("study", "table-2", "--preset", columns, "--out", "mine")
    assert (code, "is no collection" in err) == (2, True)
    (tmp_path / "mine" / "collection.yaml").write_text("collection: relu-revival-all\nmembers: [tiny]\n")
    code, _, err = normfree("study", "table-2", "--preset", columns, "--out", "mine")
    assert (code, "holds another collection" in err) == (2, True)
    code, _, err = normfree("report", "mine")
    assert (code, "no study folder" in err) == (2, True)
