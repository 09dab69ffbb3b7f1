"""Tables, intervals, HTML pages and saved figures; the figures that several studies share are modules of this package.

Each figure is a function from data frames to a matplotlib ``Figure``; :mod:`normfree.plot` lists all of them.
"""

from normfree.report.html import (
    Callout,
    Code,
    Element,
    FigureElement,
    KeyValues,
    Paragraph,
    Section,
    Table,
    render_report,
    weights_entry,
    write_page,
    write_report,
)
from normfree.report.intervals import (
    BAND_LABELS,
    BANDS,
    Estimate,
    PairedDifference,
    band_shares,
    mean_confidence_interval,
    paired_difference,
)
from normfree.report.published import (
    PUBLISHED_NAMES,
    PublishedName,
    load_published,
    published_head_entropy,
)
from normfree.report.saving import FIGURES_FOLDER, figure_section, save_figure, saved_figure
from normfree.report.style import paper_style
from normfree.report.tables import formatted, perplexity_table, table_notes, to_console, to_markdown

__all__ = [
    "BANDS",
    "BAND_LABELS",
    "FIGURES_FOLDER",
    "PUBLISHED_NAMES",
    "Callout",
    "Code",
    "Element",
    "Estimate",
    "FigureElement",
    "KeyValues",
    "PairedDifference",
    "Paragraph",
    "PublishedName",
    "Section",
    "Table",
    "band_shares",
    "figure_section",
    "formatted",
    "load_published",
    "mean_confidence_interval",
    "paired_difference",
    "paper_style",
    "perplexity_table",
    "published_head_entropy",
    "render_report",
    "save_figure",
    "saved_figure",
    "table_notes",
    "to_console",
    "to_markdown",
    "weights_entry",
    "write_page",
    "write_report",
]
