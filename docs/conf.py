"""The site of ``make docs``: pages of this folder, and those that docs/generate.py writes before each build."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

import normfree  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "Normfree"
version = release = normfree.__version__
author = "The Normfree maintainers"
copyright = "The Normfree maintainers, Apache-2.0"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Headings get the anchors that GitHub gives them, so that one link works in both.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# A method that its base describes is not described again.
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Nothing comes from the network: the theme brings its fonts and scripts along.
smartquotes_action = "D"  # dashes, not quotes
html_theme = "pydata_sphinx_theme"
html_title = f"Normfree {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "Normfree"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_nav_level": 1,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
# Pages without others below them need no list of them.
html_sidebars = {page: [] for page in ("index", *(f"reference/{name}" for name in generate.PAGES))}
html_context = {"default_mode": "auto"}
copybutton_exclude = ".linenos, .gp, .go"

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_PAGES = {"CONTRIBUTING.md": "/reference/contributing.md", "README.md": "/index.md"}


def rewrite_outward_links(app: Sphinx, name: str, source: list[str]) -> None:
    """Points links out of docs/ to the page of the site that has the file, and turns links to folders into text."""

    def inside(link: re.Match[str]) -> str:
        words, target, anchor = link[1], (DOCS / name).parent / link[2], link[3] or ""
        if target.resolve().parent == DOCS.parent and target.name in _PAGES:
            return f"[{words}]({_PAGES[target.name]}{anchor})"
        return words if target.is_dir() else link[0]

    source[0] = _LINK.sub(inside, source[0])


_FIELD = re.compile(r"(\w+(?:, \w+)*): (?=\S)|(\w+(?:, \w+)+):$")


def typeset_docstring(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Makes reStructuredText of what docstrings write plainly: lists of fields, indented equations and code, bars."""
    typeset: list[str] = []
    in_fields = False
    for line, before in zip(lines, ["", *lines], strict=False):
        starts = not before.strip()
        last = next((each for each in reversed(typeset) if each.strip()), "")
        if (field := _FIELD.match(line)) and what == "class" and (starts or in_fields):
            in_fields = True
            line = f"- **{field[1] or field[2]}**: {line[field.end() :]}"
        elif not line.strip():
            in_fields = False
        elif in_fields and not line.startswith(" "):
            in_fields = False
            typeset.append("")
        elif in_fields:
            line = f"  {line.strip()}"
        elif line.startswith("    ") and starts and not last.endswith("::"):
            typeset += ["::", ""]
        parts = line.split("``")
        parts[::2] = [part if line.startswith("    ") else part.replace("|", r"\|") for part in parts[::2]]
        typeset.append("``".join(parts))
    lines[:] = typeset


def setup(app: Sphinx) -> None:
    """What Sphinx calls first."""
    app.connect("builder-inited", lambda app: generate.write_pages(DOCS))
    app.connect("source-read", rewrite_outward_links)
    app.connect("autodoc-process-docstring", typeset_docstring, priority=100)
