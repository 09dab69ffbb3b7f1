"""The study of docs/studies.md is trained and shown as the page says, by the command and from Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

import normfree as library

Command = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


def test_the_study_of_the_docs(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n# (placement\.py\n.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    name, _, code = source.partition("\n")
    (tmp_path / name).write_text(code)
    code_, out, err = normfree("study", f"./{name}", "--preset", preset_file, "--seeds", "0,1")
    assert code_ == 0, out + err
    folder = tmp_path / "studies" / "placement-tiny"
    assert pd.read_csv(folder / "results.csv")["configuration"].tolist() == ["Pre-LN", "Post-LN"] * 2
    assert {path.name for path in (folder / "figures").iterdir()} == {"entropy.png", "entropy.pdf"}
    report = (folder / "report.html").read_text()
    assert re.search(r"Lowest perplexity: (Pre|Post)-LN\.", report)
    (folder / "report.html").unlink()
    code_, _, err = normfree("report", folder, "--study", tmp_path / name)
    assert code_ == 0, err
    assert (folder / "report.html").exists()
    assert library.load_study(folder, tmp_path / name).name == "placement"
