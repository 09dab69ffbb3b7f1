"""Tables, figures and a self-contained HTML page from the data frames of a study."""

from normfree.report.figures import (
    evaluation_loss_curves,
    headwise_entropy_distribution,
    layerwise_entropy_dynamics,
    save_figure,
)
from normfree.report.heatmaps import headwise_entropy_heatmaps
from normfree.report.html import (
    Block,
    Callout,
    Code,
    FigureBlock,
    KeyValues,
    Paragraph,
    Section,
    Table,
    render_report,
    write_report,
)
from normfree.report.published import (
    PUBLISHED_NAMES,
    PublishedName,
    load_published,
    published_head_entropy,
)
from normfree.report.statistics import (
    BAND_LABELS,
    BANDS,
    Estimate,
    PairedDifference,
    band_shares,
    mean_confidence_interval,
    paired_difference,
)
from normfree.report.style import paper_style
from normfree.report.tables import formatted, perplexity_table, table_notes, to_console, to_markdown

__all__ = [
    "BANDS",
    "BAND_LABELS",
    "PUBLISHED_NAMES",
    "Block",
    "Callout",
    "Code",
    "Estimate",
    "FigureBlock",
    "KeyValues",
    "PairedDifference",
    "Paragraph",
    "PublishedName",
    "Section",
    "Table",
    "band_shares",
    "evaluation_loss_curves",
    "formatted",
    "headwise_entropy_distribution",
    "headwise_entropy_heatmaps",
    "layerwise_entropy_dynamics",
    "load_published",
    "mean_confidence_interval",
    "paired_difference",
    "paper_style",
    "perplexity_table",
    "published_head_entropy",
    "render_report",
    "save_figure",
    "table_notes",
    "to_console",
    "to_markdown",
    "write_report",
]
