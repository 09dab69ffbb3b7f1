"""The results of ``normfree bench`` as tables: the figures that matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.table import Table

from normfree.cli.console import table
from normfree.columns import TOKENS_PER_SECOND

Result = dict[str, Any]
NONE = "–"
_named = partial(table, n_left=1)
"""A table whose first column holds names."""


def entropy_table(length: Result) -> Table:
    """What was found at one of the ``lengths``."""
    rows = []
    for name, milliseconds in length["milliseconds"].items():
        over = (length[f"eager_{what}_over"].get(name) for what in ("time", "memory"))
        figures = (f"{each:.1f}" if each is not None else NONE for each in over)
        rows.append((name, f"{milliseconds:.3f}", f"{length['peak_mib'][name]:,.2f}", *figures))
    ratio = length["attention_and_entropy_over_attention"]
    return _named(
        ("variant", "ms", "peak MiB", "eager's time over it", "eager's memory over it"),
        rows,
        title=f"{length['tokens']:,} tokens",
        caption=f"attention with entropy takes {ratio:.2f} times as long as without",
    )


def _training(result: Result) -> list[Table]:
    speeds = ((name, f"{tokens:,}") for name, tokens in result[TOKENS_PER_SECOND].items())
    ratios = (
        (
            name.replace("_", " "),
            f"{100 * value:.2f} %" if "share" in name or name.startswith("telemetry") else f"{value:.3f} times",
        )
        for name, value in result.items()
        if isinstance(value, float)
    )
    return [
        _named(("variant", "tokens a second"), speeds, title=f"Training steps in {result['precision']}"),
        _named(("figure", "median"), ratios),
    ]


def _step_cost(result: Result) -> list[Table]:
    (ratios,) = (value for name, value in result.items() if name.startswith("step_time_over_"))
    middle = result["middle_half_of_the_rounds"]
    rows = (
        (name, f"{milliseconds:.2f}", f"{ratios[name]:.3f}", _from_to(middle[name], digits=3))
        for name, milliseconds in result["milliseconds"].items()
    )
    columns = ("variant", "ms", f"times as long as: {next(iter(ratios))}", "middle half of the rounds")
    return [_named(columns, rows, title=f"Training steps in {_how(result)}")]


def _norm_free_inference(result: Result) -> list[Table]:
    milliseconds, shares = result["milliseconds"], result["norms_share_of_layernorm_time"]
    rows = (
        (
            what,
            *(f"{milliseconds[f'{what}, {name}']:.3f}" for name in ("LayerNorm", "norm-free")),
            f"{ratio:.3f}",
            f"{shares[what]:.1%}" if what in shares else NONE,
        )
        for what, ratio in result["layernorm_time_over_norm_free"].items()
    )
    columns = ("", "LayerNorm, ms", "norm-free, ms", "times as fast without norms", "in norms")
    return [_named(columns, rows, title=f"{result['shape']['tokens']:,} tokens in {_how(result)}")]


def _sparse_decode(result: Result) -> list[Table]:
    """One or two for each number of threads."""
    return [
        shown
        for title, found in result.items()
        if isinstance(found, dict)
        for shown in (_decoded_models if "parameters" in found else _decoded_networks)(title, found)
    ]


def _decoded_networks(title: str, found: Result) -> list[Table]:
    rows = []
    sparse = [name for name in found["milliseconds"] if name.startswith("spark")]
    for name, milliseconds in found["milliseconds"].items():
        faster = (found["times_faster"].get(f"{each}, than {name}") for each in sparse)
        rows.append((name, f"{milliseconds:.3f}", *(_ratio(each) if each is not None else NONE for each in faster)))
    columns = ("network", "ms", *(f"{name} is times faster" for name in sparse))
    ideal = found["ideal"]
    caption = (
        f"by the bytes that are read: {ideal['dense']:.2f} times faster than dense, {ideal['gated']:.2f} than gated"
    )
    return [_named(columns, rows, title=title, caption=caption)]


def _decoded_models(title: str, found: Result) -> list[Table]:
    speeds = (
        (name, f"{speed:.2f}", f"{found['gigabytes_a_token'][name.split(',')[0]]:.3f}")
        for name, speed in found["tokens_a_second"].items()
    )
    ratios = ((name, _ratio(each)) for name, each in found["times_faster"].items())
    caption = f"by the bytes that are read: {found['ideal']:.2f} times faster"
    return [
        _named(("model", "tokens a second", "GB a token"), speeds, title=title),
        _named(("spark against dense", "times faster"), ratios, caption=caption),
    ]


def _pipeline(result: Result) -> list[Table]:
    rows = []
    for subject, found in result["subjects"].items():
        over = found.get("time_over_limit", {})
        rates: Result = next((value for key, value in found.items() if key.endswith("_a_second")), {})
        for name, seconds in found["seconds"].items():
            if name == found.get("limit"):
                continue
            rate = f"{rates[name]:,.0f}" if name in rates else NONE
            ratio = f"{over[name]:.2f} × {found['limit']}" if over else NONE
            rows.append((subject, name, f"{seconds:.3f}", rate, ratio))
    caption = (
        f"this machine: {result['matmul_fp32_gflops']:,.0f} GFLOP/s in fp32, {result['matmul_bf16_gflops']:,.0f} in "
        f"bf16, {result['copied_gigabytes_a_second']:.1f} GB/s copied"
    )
    columns = ("subject", "what", "seconds", "MB or tokens a second", "time over the limit")
    return [table(columns, rows, n_left=2, title="Around the training step", caption=caption)]


def _long_run(result: Result) -> list[Table]:
    def row(label: str, name: str, form: str) -> tuple[str, ...]:
        names = (f"{name}_first_tenth", f"{name}_last_tenth", f"{name}_largest", f"{name}_growth_an_hour")
        return (label, *(format(result[each], form) if each in result else NONE for each in names))

    rows = [
        row("private memory, MiB", "own_mib", ",.1f"),
        row("resident memory, MiB", "resident_mib", ",.1f"),
        row("open files", "open_files", ".1f"),
    ]
    return [
        _named(
            ("median", "first tenth", "last tenth", "largest", "growth an hour"),
            rows,
            title=f"{result['steps']:,} steps in {result['hours']:.2f} hours",
            caption=f"{result['rows_a_step']:g} rows of telemetry a step, {result['telemetry_mib']:.2f} MiB, "
            f"{result['telemetry_bytes_over_predicted']:.3f} times what the first tenth predicted",
        )
    ]


TABLES: dict[str, Callable[[Result], list[Table]]] = {
    "entropy": lambda result: [],  # each length is shown as soon as it is measured
    "training": _training,
    "step_cost": _step_cost,
    "norm_free_inference": _norm_free_inference,
    "sparse_decode": _sparse_decode,
    "pipeline": _pipeline,
    "long_run": _long_run,
}
"""By the module of :mod:`normfree.benchmarks`."""


def _how(result: Result) -> str:
    return f"{result['dtype']}{', compiled' if result['compiled'] else ''}"


def _ratio(found: Result) -> str:
    return f"{found['median']:.2f} ({_from_to(found['middle_80_percent'], digits=2)})"


def _from_to(interval: list[float], *, digits: int) -> str:
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}"
