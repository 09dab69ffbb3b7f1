"""``normfree private-cost``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normfree.cli.console import open_console, print_json, records, say, say_origin, table
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Json, checked_folder, checked_source, command_line
from normfree.errors import InputError
from normfree.progress import stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from normfree_private.costs import PrivateCosts


Models = Annotated[
    list[str],
    typer.Argument(
        help="Runs, model folders, Hub ids, presets (the four configurations) or YAML files; compared on one page.",
        callback=checked_source("model"),
    ),
]
Length = Annotated[int | None, typer.Option(min=2, help="T; default: the run's or preset's.")]
Protocols = Annotated[
    list[str] | None, typer.Option(help="semi2k, aby3 or cheetah; repeatable; default: semi2k and aby3.")
]
Vocabulary = Annotated[int | None, typer.Option(min=1, help="For presets whose tokenizer is on the Hub.")]
BlocksOnly = Annotated[bool, typer.Option("--blocks-only", help="Leave embedding, final norm and unembedding out.")]
EndToEnd = Annotated[
    bool, typer.Option("--end-to-end", help="Run each whole model under encryption; for small trained models.")
]
Alternatives = Annotated[
    bool, typer.Option("--alternatives/--no-alternatives", help="Measure every norm and activation too.")
]
Networks = Annotated[
    list[str] | None,
    typer.Option(help="NAME=MBIT_PER_SECOND,DELAY_MS for projections; default: LAN=1000,0.5 and WAN=100,20."),
]
EnginePython = Annotated[
    Path | None,
    typer.Option(help="Python of the engine's environment; default: $NORMFREE_ENGINE_PYTHON or .venv-private."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for CSV files, figures and the report; default private-cost/MODEL.", callback=checked_folder
    ),
]


def private_cost(
    models: Models,
    sequence_length: Length = None,
    protocol: Protocols = None,
    vocab_size: Vocabulary = None,
    blocks_only: BlocksOnly = False,
    end_to_end: EndToEnd = False,
    with_alternatives: Alternatives = True,
    network: Networks = None,
    field: Annotated[str, typer.Option(help="Ring of the shares: fm64 or fm128.")] = "fm64",
    fraction_bits: Annotated[int, typer.Option(help="Bits behind the binary point.")] = 18,
    runs: Annotated[int, typer.Option(help="Runs for the median of the seconds.")] = 3,
    timeout: Annotated[int, typer.Option(help="Seconds that one program may take.")] = 600,
    engine_python: EnginePython = None,
    out: Out = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """What models cost under secure multi-party computation: bytes, messages and seconds of each operation, in SPU.

    Example: normfree private-cost studies/relu-revival-cpu/runs/*/seed-0 --sequence-length 128 --end-to-end
    """
    from normfree_private.costs import DEFAULT_PROTOCOLS, make_settings, measure_private_costs
    from normfree_private.page import write_page
    from normfree_private.projection import NETWORKS, parse_network

    for source in models:
        if models.count(source) > 1:
            raise InputError(f"{source} is given twice; give each model once")
    settings = make_settings(
        protocol or DEFAULT_PROTOCOLS, field=field, fraction_bits=fraction_bits, runs=runs, timeout_seconds=timeout
    )
    networks = [parse_network(text) for text in network] if network else list(NETWORKS)
    folder = output_folder(out, "private-cost", models)
    console = open_console(json_)
    with stage("private cost") as progress:
        costs = measure_private_costs(
            {model_name(source, models): source for source in models},
            settings=settings,
            networks=networks,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            blocks_only=blocks_only,
            with_alternatives=with_alternatives,
            end_to_end=end_to_end,
            engine_python=engine_python,
            cache_dir=cache_dir,
            progress=lambda note: progress.update(note=note),
        )
    write_page(costs, folder, command=command_line())
    _show(costs, folder, console, json_=json_)


def _show(costs: PrivateCosts, folder: Path, console: Console, *, json_: bool) -> None:
    if json_:
        frames = {name: records(frame) for name, frame in costs.frames().items()}
        print_json(folder=str(folder), quantization=costs.quantization, **frames)
        return
    console.print(_totals_table(costs))
    say_origin(console, costs.quantization)
    say(console, f"Report: {folder / 'report.html'}")


def _totals_table(costs: PrivateCosts) -> Table:
    seconds = [f"{each.name} s" for each in costs.networks]
    columns = ["model", "protocol", "part", "MB", "messages", *seconds, "norms %", "activations %", "perplexity"]
    rows = (
        (
            *(row[name] for name in columns[:3]),
            f"{row['bytes_sent'] / 1e6:,.1f}",
            f"{row['messages_sent']:,.0f}",
            *(f"{row[f'{each.name}_seconds']:,.1f}" for each in costs.networks),
            *(f"{row.get(f'{group}_percent', 0.0):.1f}" for group in ("norm", "activation")),
            f"{row['eval_ppl']:.1f}" if row["eval_ppl"] == row["eval_ppl"] else "–",
        )
        for row in costs.totals.to_dict("records")
    )
    return table(columns, rows, n_left=3)
