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
COLUMNS = ("entropy", "depth", "prune-layers", "from_hf", "remove-norm", "model types")

_INTRO = """# Which models Normfree reads

<!-- Written by `{command}`. -->

Look up the `model_type` of your model's `config.json`. The table covers every causal language model for which
transformers {version} has an auto class, built tiny and random, float32, on the CPU: {read} of {total} are read in
full, {partly} in part, {refused} are refused, {without} have no softmax attention. Another configuration of a model
type may be refused where this one is read. [Two real models](real-models.md) have their own page.

The sweep is a test: it fails if a number is wrong by more than 1e-5 (largest entropy difference: {agreement:.0e} nats),
or if anything but a one-line error is raised. `make test` sweeps 25 model types, `make nightly` all of them.

| column | what is checked |
|---|---|
| entropy | `EntropyProbe`, `normfree entropy`, `measure`, `EntropyCallback`, `EntropyMonitor`. \
*{read_word}*: entropies per head and position and attention to the first key match a float64 computation from the \
model's own eager softmax, for every padding, default and eager attention, in one pass and with a KV cache; logits of \
the probed model are bit-identical. *{partly_word}*: `unreadable` names some modules: linear attention, or \
cross-attention and image or audio towers that nothing called. *no reference*: read, but nothing to compare with |
| depth | `normfree depth`: the loss, and losses without each layer, match forward hooks that skip it |
| prune-layers | `normfree prune-layers`: the logits are those with the layers skipped. \
*{last_only}*: what a layer does depends on its index |
| from_hf | [`normfree.from_hf`](conversion.md): logits within 1e-5, padding included |
| remove-norm | [`normfree remove-norm`](removal.md): constant norms fold away with unchanged logits |

Numbers in parentheses refer to the reasons below, which name layers of the tiny models.

"""


def page(rows: Iterable[Row]) -> str:
    """The page of ``rows``: model types with equal results share a line, those with the fewest reasons first."""
    rows = sorted(rows, key=lambda row: row.model_type)
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row in rows:
        groups.setdefault(tuple(cells_of(row)), []).append(f"`{row.model_type}`")
    notes: dict[str, int] = {}
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for cells, names in sorted(groups.items(), key=_order):
        lines.append(f"| {' | '.join(_with_number(cell, notes) for cell in cells)} | {' '.join(names)} |")
    counts = {status: sum(row.status == status for row in rows) for status in (READ, PARTLY, REFUSED, NO_ATTENTION)}
    intro = _INTRO.format(
        command=COMMAND,
        version=transformers.__version__,
        total=len(rows),
        read=counts[READ],
        partly=counts[PARTLY],
        refused=counts[REFUSED],
        without=counts[NO_ATTENTION],
        agreement=max((row.agreement_nats for row in rows if row.status in (READ, PARTLY)), default=0.0),
        last_only=LAST_ONLY,
        read_word=READ,
        partly_word=PARTLY,
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


def _order(group: tuple[tuple[tuple[str, str], ...], list[str]]) -> tuple[int, int]:
    """Position of a group of model types on the page: by reasons, then by size, the largest first."""
    cells, names = group
    return sum(bool(reason) for _, reason in cells), -len(names)


def read_page(text: str) -> tuple[str, Mapping[str, list[tuple[str, str]]]]:
    """transformers' version and the cells of each model type, as :func:`cells_of` gives them, from a page."""
    version = re.search(r"which\stransformers (\S+) has", text)
    assert version is not None
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = {}
    for line in re.findall(r"^\| .* \| `.*` \|$", text, re.MULTILINE):
        *cells, names = line.strip("| ").split(" | ")
        for model_type in names.split():
            rows[model_type.strip("`")] = [_without_number(cell, reasons) for cell in cells]
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
