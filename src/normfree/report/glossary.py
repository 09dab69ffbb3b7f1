"""The words of a report, explained in it: only those that it uses."""

import re
from collections.abc import Iterable

from normfree.report.html import KeyValues, Section

_TERMS = {
    "SM": (r"\bSM\b", "softmax attention, which every model here has"),
    "LN": (r"\bLN\b", "LayerNorm, in each block twice; labels without it name norm-free models"),
    "G": (r"\+G\d*(?![a-z])|\dG\d", "GELU in the feed-forward networks; a number counts the layers"),
    "R": (r"\+R\d*(?![a-z])|\dR\d", "ReLU in the feed-forward networks; a number counts the layers"),
    "L": (r"\+L \d", "leaky ReLU, with its negative slope"),
    "QK": (r"\+QK\b", "queries and keys are normalized"),
    "nats": (r"\bnats\b", "units of the natural logarithm; 1 nat is 1.44 bits. Losses are per predicted token."),
    "Perplexity": (r"\bPerplexity\b", "e to the evaluation loss in nats: lower is better"),
    "Δ": ("Δ", "difference from the baseline, seed by seed"),
    "Entropy": ("[Ee]ntropy", "of a head's attention weights, mean over queries: 0 for one key, ln i for i keys alike"),
    "Bands": (
        r"\bband\b",
        "quarters of the range from 0 to max, the largest entropy of any head in any configuration; heads in the top "
        "quarter are overloaded",
    ),
}
"""Pattern of the uses, and meaning, by term."""


def glossary(texts: Iterable[str]) -> Section | None:
    """A section with the terms that occur in ``texts``: labels, heads of columns, captions. None if there are none."""
    used = "\n".join(texts)
    found = {term: meaning for term, (pattern, meaning) in _TERMS.items() if re.search(pattern, used)}
    return Section("Terms", [KeyValues(found)]) if found else None
