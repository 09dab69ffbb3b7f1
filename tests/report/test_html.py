import base64
import io
import re
from datetime import date
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from normfree.errors import InputError
from normfree.report import (
    Callout,
    Code,
    FigureElement,
    KeyValues,
    Link,
    Paragraph,
    Section,
    Table,
    render_report,
    write_page,
    write_report,
)
from normfree.report.glossary import glossary

HOSTILE = "<script>alert('x')</script><img src=http://example.org/x.png onerror=\"alert(1)\">&amp;"
VOID = {"meta", "link", "img", "br", "hr"}


def _png(width=1300, height=40):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


def sections(text="a run"):
    frame = pd.DataFrame(
        {"configuration": [text, "SM+G"], "seed": [0, 1], "eval_loss": [4.123456, np.nan], text: ["a", None]}
    )
    return [
        Section(
            text, [Paragraph(text), Callout(text, "warning"), Code(f"{text}\n  indented"), KeyValues({text: text})]
        ),
        Section("Results", [Table(frame, text, {"eval_loss": ".2f"}, notes=[text]), FigureElement(_png(), text, text)]),
        Section("Results", []),
    ]


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps elements with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.open: list[Any] = []
        self.elements: list[Any] = []
        self.text = ""
        self.cells: list[Any] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def _render(text="a run"):
    return render_report(title=text, lead=text, sections=sections(text), meta={text: text})


def test_page_is_well_formed_and_self_contained():
    html = _render()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy
    assert re.search(r"https?://|<script|javascript:|@import|url\(", html) is None
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(link["href"].startswith(("data:", "#")) for link in page.all("link") + page.all("a"))
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "form", "base"}


def test_policy_comes_before_anything_it_governs():
    tags = [tag for tag, _ in Page(_render()).elements]
    assert tags[:4] == ["html", "head", "meta", "meta"]


def test_hostile_text_is_shown_as_text_everywhere():
    page = Page(_render(HOSTILE))
    assert not page.all("script")
    assert all("onerror" not in attributes for _, attributes in page.elements)
    # Title, heading, lead, contents, section, paragraph, callout, code, key, value, caption, header, cell, note,
    # figure caption, meta name and value.
    assert page.text.count(HOSTILE) == 17
    (image,) = page.all("img")
    assert image["alt"] == HOSTILE


def test_contents_lead_to_the_sections():
    page = Page(_render("Größe & Maß"))
    targets = [link["href"].removeprefix("#") for link in page.all("a")]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert targets == ["s-groe-ma", "s-results", "s-results-2"]
    assert set(targets) <= set(ids)
    assert len(ids) == len(set(ids))


def test_table_has_scopes_formats_and_nan():
    page = Page(_render())
    headers = page.all("th")
    assert [header["scope"] for header in headers] == ["col"] * 4 + ["row"] * 2
    assert page.cells == [
        "configuration",
        "seed",
        "eval_loss",
        "a run",
        "a run",
        "0",
        "4.12",
        "a",
        "SM+G",
        "1",
        "NaN",
        "\N{EN DASH}",
    ]
    assert sum("nan" in cell.get("class", "").split() for cell in page.all("td")) == 1
    labels = {attributes.get("aria-labelledby") for tag, attributes in page.elements if tag == "table"}
    assert labels <= {attributes.get("id") for _, attributes in page.elements}


def test_grouped_columns_have_a_common_head():
    frame = pd.DataFrame({"name": ["a"], "x": [-1.5], "low": [1], "high": [2]})
    table = Table(frame, "", {"x": "+.1f"}, groups={"range, %": ["low", "high"]})
    page = Page(render_report(title="t", lead="l", sections=[Section("s", [table])], meta={}))
    name, x, group, low, high, _ = page.all("th")
    assert name == {"scope": "col", "rowspan": "2"}
    assert x == {"scope": "col", "rowspan": "2", "class": "quantity"}
    assert group == {"scope": "colgroup", "colspan": "2", "class": "group"}
    assert low == high == {"scope": "col", "class": "quantity"}
    assert page.cells == ["name", "x", "range, %", "low", "high", "a", "\N{MINUS SIGN}1.5", "1", "2"]
    with pytest.raises(InputError, match="unknown column to group 'lo'"):
        Table(frame, "", groups={"range": ["lo", "high"]})
    with pytest.raises(InputError, match="the columns of the group 'both' are no neighbours"):
        Table(frame, "", groups={"both": ["x", "high"]})


def test_caution_comes_before_the_lead_and_sources_are_linked():
    page = Page(
        render_report(
            title="t",
            lead="the lead",
            sections=[],
            meta={},
            byline="28 November 2026",
            sources=[Link("a paper", "https://example.org/a?b=1&c=2")],
            caution=HOSTILE,
        )
    )
    (link,) = page.all("a")
    assert link["href"] == "https://example.org/a?b=1&c=2"
    assert page.text.index("28 November 2026 · a paper") < page.text.index(HOSTILE) < page.text.index("the lead")
    with pytest.raises(InputError, match="begin with https://"):
        Link("a paper", "javascript:alert(1)")


def test_the_byline_has_the_date_and_facts(tmp_path):
    path = write_page(tmp_path / "report.html", title="t", lead="l", sections=[], meta={}, facts=["preset smoke"])
    today = date.today()
    assert f"{today.day} {today:%B %Y} · preset smoke" in Page(path.read_text()).text


def test_the_glossary_explains_the_words_that_are_used():
    section = glossary(["SM+LN+G", "SM+G2R4", "Loss, nats"])
    assert section is not None
    (terms,) = section.elements
    assert isinstance(terms, KeyValues)
    assert list(terms.items) == ["SM", "LN", "G", "R", "nats"]
    assert glossary(["Pre-norm", "Gemma", "Result"]) is None


@pytest.mark.parametrize(
    ("value", "form", "written"),
    [(0.206, ".1%", "20.6 %"), (-1.0, ".1f", "\N{MINUS SIGN}1.0"), (-3, "", "\N{MINUS SIGN}3"), (np.nan, ".1%", "NaN")],
)
def test_numbers_in_cells(value, form, written):
    assert Table(pd.DataFrame({"name": ["a"], "x": [value]}), "", {"x": form}).rows == [["a", written]]


def test_figure_is_embedded_whole():
    (image,) = Page(_render()).all("img")
    assert base64.b64decode(image["src"].split(",")[1]) == _png()
    assert (image["width"], image["height"], image["alt"]) == ("1300", "40", "a run")


def test_figure_must_be_png():
    with pytest.raises(InputError, match="'A figure' is not a PNG image"):
        render_report(
            title="t", lead="l", sections=[Section("s", [FigureElement(b"<svg/>", "a", "A figure")])], meta={}
        )


def test_unknown_column_to_format():
    with pytest.raises(InputError, match=r"unknown column to format 'eval_los' \(did you mean 'eval_loss'"):
        Table(pd.DataFrame({"eval_loss": [1.0]}), "", {"eval_los": ".2f"})


def test_numbers_without_format_have_four_digits():
    frame = pd.DataFrame({"name": ["a"], "x": [1.23456789], "n": np.array([3], dtype=np.int64)})
    assert Table(frame, "").rows == [["a", "1.235", "3"]]
    assert Table(frame, "").columns == [("name", False), ("x", True), ("n", True)]


def test_written_whole(tmp_path):
    path = write_report(tmp_path / "study" / "report.html", _render("Δ ±"))
    assert path.read_text(encoding="utf-8") == _render("Δ ±")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
