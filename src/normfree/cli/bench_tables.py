"""The results of ``normfree bench`` as tables: the figures that matter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Result = dict[str, Any]
NONE = "–"


def entropy_table(length: Result) -> Table:
    """What was found at one of the ``lengths``."""
    rows = []
    for name, milliseconds in length["milliseconds"].items():
        over = [length[f"eager_{what}_over"].get(name) for what in ("time", "memory")]
        figures = (f"{each:.1f}" if each is not None else NONE for each in over)
        rows.append((name, f"{milliseconds:.3f}", f"{length['peak_mib'][name]:,.2f}", *figures))
    return _table(
        f"{length['tokens']:,} tokens",
        ("variant", "ms", "peak MiB", "eager's time over it", "eager's memory over it"),
        rows,
        f"attention with entropy takes {length['attention_and_entropy_over_attention']:.2f} times as long as without",
    )


def training_tables(result: Result) -> list[Table]:
    speeds = [(name, f"{tokens:,}") for name, tokens in result["tokens_per_second"].items()]
    comparisons = [
        (name.replace("_", " "), f"{value:.2%}" if name.startswith(("telemetry", "share")) else f"{value:.3f} times")
        for name, value in result.items()
        if isinstance(value, float)
    ]
    return [
        _table(f"Training steps in {result['precision']}", ("variant", "tokens a second"), speeds),
        _table("", ("figure", "median"), comparisons),
    ]


def step_cost_table(result: Result) -> Table:
    (ratios,) = (value for name, value in result.items() if name.startswith("step_time_over_"))
    middle = result["middle_half_of_the_rounds"]
    usual = next(iter(ratios))
    return _table(
        f"Training steps in {result['dtype']}{', compiled' if result['compiled'] else ''}",
        ("variant", "ms", f"times as long as: {usual}", "middle half of the rounds"),
        [
            (name, f"{milliseconds:.2f}", f"{ratios[name]:.3f}", _from_to(middle[name], digits=3))
            for name, milliseconds in result["milliseconds"].items()
        ],
    )


def norm_free_inference_table(result: Result) -> Table:
    milliseconds = result["milliseconds"]
    return _table(
        f"{result['shape']['tokens']:,} tokens in {result['dtype']}{', compiled' if result['compiled'] else ''}",
        ("", "LayerNorm, ms", "norm-free, ms", "times as fast without norms"),
        [
            (what, *(f"{milliseconds[f'{what}, {name}']:.3f}" for name in ("LayerNorm", "norm-free")), f"{ratio:.3f}")
            for what, ratio in result["layernorm_time_over_norm_free"].items()
        ],
    )


def sparse_decode_tables(result: Result) -> list[Table]:
    """One or two for each number of threads."""
    found = {title: each for title, each in result.items() if isinstance(each, dict)}
    return [
        table
        for title, each in found.items()
        for table in (_decoded_models(title, each) if "parameters" in each else [_decoded_networks(title, each)])
    ]


def long_run_table(result: Result) -> Table:
    def row(label: str, name: str, form: str) -> tuple[str, ...]:
        names = (f"{name}_first_tenth", f"{name}_last_tenth", f"{name}_largest", f"{name}_growth_an_hour")
        return (label, *(format(result[each], form) if each in result else NONE for each in names))

    return _table(
        f"{result['steps']:,} steps in {result['hours']:.2f} hours",
        ("median", "first tenth", "last tenth", "largest", "growth an hour"),
        [
            row("private memory, MiB", "own_mib", ",.1f"),
            row("resident memory, MiB", "resident_mib", ",.1f"),
            row("open files", "open_files", ".1f"),
        ],
        f"{result['rows_a_step']:g} rows of telemetry a step, {result['telemetry_mib']:.2f} MiB, "
        f"{result['telemetry_bytes_over_predicted']:.3f} times what the first tenth predicted",
    )


def _decoded_networks(title: str, found: Result) -> Table:
    rows = []
    sparse = [name for name in found["milliseconds"] if name.startswith("spark")]
    for name, milliseconds in found["milliseconds"].items():
        faster = (found["times_faster"].get(f"{each}, than {name}") for each in sparse)
        rows.append((name, f"{milliseconds:.3f}", *(_ratio(each) if each is not None else NONE for each in faster)))
    ideal = found["ideal"]
    return _table(
        title,
        ("network", "ms", *(f"{name} is times faster" for name in sparse)),
        rows,
        f"by the bytes that are read: {ideal['dense']:.2f} times faster than dense, {ideal['gated']:.2f} than gated",
    )


def _decoded_models(title: str, found: Result) -> list[Table]:
    speeds = [
        (name, f"{speed:.2f}", f"{found['gigabytes_a_token'][name.split(',')[0]]:.3f}")
        for name, speed in found["tokens_a_second"].items()
    ]
    return [
        _table(title, ("model", "tokens a second", "GB a token"), speeds),
        _table(
            "",
            ("spark against dense", "times faster"),
            [(name, _ratio(each)) for name, each in found["times_faster"].items()],
            f"by the bytes that are read: {found['ideal']:.2f} times faster",
        ),
    ]


def _ratio(found: Result) -> str:
    return f"{found['median']:.2f} ({_from_to(found['middle_80_percent'], digits=2)})"


def _from_to(interval: list[float], *, digits: int) -> str:
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]], caption: str = "") -> Table:
    """The first column to the left, figures to the right."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        shown.add_row(*row)
    return shown
