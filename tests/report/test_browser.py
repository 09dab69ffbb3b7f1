"""The report in a real browser: nothing asked for, nothing complained about, nothing wider than a phone."""

import pandas as pd
import pytest

from normfree.report import (
    FigureElement,
    Section,
    Table,
    published_head_entropy,
    render_report,
    save_figure,
    write_report,
)
from normfree.report.entropy_figures import headwise_entropy_heatmaps

from .chromium import EXECUTABLE, Chromium
from .test_html import HOSTILE, sections

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium, chromium-browser or google-chrome on PATH")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    png, _ = save_figure(headwise_entropy_heatmaps(published_head_entropy()), folder, "heatmaps")
    wide = pd.DataFrame({f"a column with a long name {i}": ["0.123456789 ± 0.123456789"] for i in range(20)})
    long_word = "SM+LN+G-" * 40
    html = render_report(
        title=long_word,
        lead=HOSTILE,
        sections=[
            *sections(long_word),
            *sections(HOSTILE),
            Section("Wide", [Table(wide, "A wide table"), FigureElement(png.read_bytes(), "Heatmaps", "Heatmaps")]),
        ],
        meta={long_word: long_word},
    )
    return write_report(folder / "report.html", html)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_report_asks_for_nothing_and_fits(browser, report, width, dark):
    browser.open(report.as_uri(), width=width, dark=dark)
    assert browser.evaluate("window.innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [report.as_uri()]
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_wide_tables_scroll_by_themselves(browser, report):
    browser.open(report.as_uri(), width=390)
    overflows = "[...document.querySelectorAll('.table .scroll')].map(box => box.scrollWidth > box.clientWidth)"
    assert browser.evaluate(overflows)[-1] is True


def test_the_policy_holds_against_injected_content(browser, report, tmp_path):
    """The browser does report a violation and refuses the content: the clean record above means something."""
    page = report.read_text(encoding="utf-8").replace(
        "</main>", "</main><img src='http://192.0.2.1/x.png'><script>document.title = 'ran'</script>"
    )
    injected = write_report(tmp_path / "injected.html", page)
    browser.open(injected.as_uri(), width=390)
    assert sum("Content Security Policy" in message for message in browser.messages) >= 2
    assert browser.evaluate("document.title") != "ran"


def test_too_wide_a_page_is_noticed(browser, tmp_path):
    page = write_report(
        tmp_path / "wide.html",
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><div style='width:900px'>x</div>",
    )
    browser.open(page.as_uri(), width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
