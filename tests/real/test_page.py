"""docs/real-models.md is what the results give: no number in it is typed in."""

import re
from pathlib import Path

from examples.real_models.__main__ import DOCS, RESULTS
from examples.real_models.claims import CLAIMS
from examples.real_models.figures import write_figures
from examples.real_models.page import render_page

PAGE = DOCS / "real-models.md"


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text(encoding="utf-8") == render_page(RESULTS)


def test_its_figures_are_there_and_small():
    images = [PAGE.parent / link for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))]
    assert len(images) == 6
    assert all(image.stat().st_size < 150_000 for image in images)


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text(encoding="utf-8"))
    assert not [link for link in links if not link.startswith("http") and not (PAGE.parent / link).exists()]


def test_every_claim_of_the_five_papers_has_a_verdict_for_both_models():
    text = PAGE.read_text(encoding="utf-8")
    assert len({claim.paper for claim in CLAIMS}) == 5
    for claim in CLAIMS:
        (row,) = [line for line in text.splitlines() if claim.text in line]
        assert row.count("|") == 5
        assert "nan" not in row


def test_figures_are_drawn_from_the_results(tmp_path):
    write_figures(RESULTS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in Path(DOCS / "images").glob("real-models-*")
    }


def test_the_commands_are_whole():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("normfree ")]
    assert len(lines) == 7
    for line in lines:
        assert re.fullmatch(r"normfree (entropy|depth|interpret) \S+\.gguf --corpus directory:\S+ .*--out \S+", line)
