"""docs/models.md: the rows of a sweep as a page, and read back from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import transformers

from tests.coverage.sweep import LAST_ONLY, NO_ATTENTION, PARTLY, READ, REFUSED, YES, Row
from tests.coverage.tiny_models import UNBUILT

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = "make models"
COLUMNS = (
    "architecture",
    "model type",
    "entropy",
    "agreement, nats",
    "depth",
    "prune-layers",
    "from_hf",
    "remove-norm",
)

_INTRO = """# Which models Normfree reads

<!-- Written by `{command}`. -->

Every causal language model that transformers {version} has an auto class for, built tiny and random, in float32 on the
CPU: {read} of {total} are read in full, {partly} in part, {refused} are refused, {without} have no softmax attention.
The same sweep is a test: it fails if a number is wrong by more than 1e-5, or if anything but one clear line is raised.
`make test` sweeps 25 architectures, the most used and the hardest, `make nightly` all of them.

- **entropy**: `EntropyProbe` (and `normfree entropy`, `measure`, `EntropyCallback`, `EntropyMonitor`). *read*: mean
  entropies by head and by position and the share of the first key agree with a float64 computation from the model's own
  eager softmax, without padding, with padding on the left and on the right, under the default attention implementation
  and under eager, in one pass and token by token with a KV cache (where the model's own logits agree with one pass);
  the logits of the probed model are the same bit for bit. *partly read*: some modules are named in `unreadable`: linear
  attention, or cross-attention and image or audio towers that nothing called. *refused*: all are.
  *no reference*: read, but its softmax could not be seen apart from the probe.
- **agreement**: the largest difference from that computation, of a head or of a head at a position.
- **depth**: `normfree depth`; loss and losses without each layer agree with forward hooks that skip it.
- **prune-layers**: `normfree prune-layers`; the pruned model's logits are those with the layers skipped.
  *{last_only}*: what a layer does depends on its index.
- **from_hf**: `normfree.from_hf`, the same logits to 1e-5, padding included ([conversion.md](conversion.md)).
- **remove-norm**: `normfree remove-norm`; norms that have been made constant fold away with the same logits.

Numbers in parentheses name the reasons below the table, which speak of tiny models' layers. Another configuration of
an architecture may be refused where this one is read. [Two real models](real-models.md) have a page of their own.

"""


def page(rows: Iterable[Row]) -> str:
    """The page of ``rows``, sorted by model type."""
    rows = sorted(rows, key=lambda row: row.model_type)
    notes: dict[str, int] = {}
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        cells = cells_of(row)
        shown = [_with_number(cell, notes) for cell in cells]
        nats = f"{row.agreement_nats:.0e}" if row.status in (READ, PARTLY) else ""
        lines.append(f"| {row.architecture} | `{row.model_type}` | {' | '.join([shown[0], nats, *shown[1:]])} |")
    counts = {status: sum(row.status == status for row in rows) for status in (READ, PARTLY, REFUSED, NO_ATTENTION)}
    intro = _INTRO.format(
        command=COMMAND,
        version=transformers.__version__,
        total=len(rows),
        read=counts[READ],
        partly=counts[PARTLY],
        refused=counts[REFUSED],
        without=counts[NO_ATTENTION],
        last_only=LAST_ONLY,
    )
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    unbuilt = [f"- `{model_type}`: {reason}" for model_type, reason in sorted(UNBUILT.items())]
    return "\n".join(
        [intro + "\n".join(lines), "\n## Reasons\n", *reasons, "\n## Not built\n", *unbuilt, ""],
    )


def cells_of(row: Row) -> list[tuple[str, str]]:
    """What the page says of a row, apart from numbers: a word and a reason for each column."""
    words = [(row.status, row.reason if row.status != READ else "")]
    others = (row.depth, row.prune_layers, row.from_hf, row.remove_norm)
    words += [(value, "") if value in (YES, LAST_ONLY) else ("no", value) for value in others]
    return [(word, _general(reason, row.architecture)) for word, reason in words]


def read_page(text: str) -> tuple[str, Mapping[str, list[tuple[str, str]]]]:
    """transformers' version and the cells of each model type, as :func:`cells_of` gives them, from a page."""
    version = re.search(r"that transformers (\S+) has", text)
    assert version is not None
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = {}
    for line in re.findall(r"^\| \w+ \| `.*\|$", text, re.MULTILINE):
        _, model_type, entropy, _, *others = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[model_type.strip("`")] = [_without_number(cell, reasons) for cell in (entropy, *others)]
    return version[1], rows


def _general(reason: str, architecture: str) -> str:
    """A reason that is the same for all architectures it holds for, without a list that grows."""
    reason = re.sub(r"; allowed: .*", "", reason)
    return " ".join(reason.replace(f"a {architecture}", "this architecture").replace(architecture, "the model").split())


def _with_number(cell: tuple[str, str], notes: dict[str, int]) -> str:
    word, reason = cell
    return f"{word} ({notes.setdefault(reason, len(notes) + 1)})" if reason else word


def _without_number(cell: str, reasons: Mapping[str, str]) -> tuple[str, str]:
    found = re.fullmatch(r"(.*) \((\d+)\)", cell)
    return (cell, "") if found is None else (found[1], reasons[found[2]])
