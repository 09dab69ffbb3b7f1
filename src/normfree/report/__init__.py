"""Tables, intervals, HTML pages and saved figures; the figures that several studies share are modules of this package.

Each figure is a function from data frames to a matplotlib ``Figure``; :mod:`normfree.plot` lists all of them.
"""

from normfree.report.html import Callout as Callout
from normfree.report.html import Code as Code
from normfree.report.html import Element as Element
from normfree.report.html import FigureElement as FigureElement
from normfree.report.html import KeyValues as KeyValues
from normfree.report.html import Link as Link
from normfree.report.html import Paragraph as Paragraph
from normfree.report.html import Section as Section
from normfree.report.html import Table as Table
from normfree.report.html import render_report as render_report
from normfree.report.html import weights_entry as weights_entry
from normfree.report.html import write_page as write_page
from normfree.report.html import write_report as write_report
from normfree.report.intervals import BAND_LABELS as BAND_LABELS
from normfree.report.intervals import BANDS as BANDS
from normfree.report.intervals import Estimate as Estimate
from normfree.report.intervals import PairedDifference as PairedDifference
from normfree.report.intervals import band_shares as band_shares
from normfree.report.intervals import mean_confidence_interval as mean_confidence_interval
from normfree.report.intervals import paired_difference as paired_difference
from normfree.report.published import PUBLISHED_NAMES as PUBLISHED_NAMES
from normfree.report.published import PublishedName as PublishedName
from normfree.report.published import load_published as load_published
from normfree.report.published import published_head_entropy as published_head_entropy
from normfree.report.saving import FIGURES_FOLDER as FIGURES_FOLDER
from normfree.report.saving import figure_section as figure_section
from normfree.report.saving import save_figure as save_figure
from normfree.report.saving import saved_figure as saved_figure
from normfree.report.style import paper_style as paper_style
from normfree.report.tables import column_groups as column_groups
from normfree.report.tables import formatted as formatted
from normfree.report.tables import perplexity_table as perplexity_table
from normfree.report.tables import table_notes as table_notes
from normfree.report.tables import to_console as to_console
from normfree.report.tables import to_markdown as to_markdown
