"""``normfree private-cost``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from normfree.cli.options import (
    DEFAULT_CACHE_DIR,
    CacheDir,
    Json,
    checked_folder,
    checked_source,
    model_name,
    open_console,
    output_folder,
    quantized,
    say_quantized,
)


def private_cost(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Runs, model folders, Hub ids, presets (the four configurations) or YAML files; compared on one page.",
            callback=checked_source("model"),
        ),
    ],
    sequence_length: Annotated[int | None, typer.Option(min=2, help="T; default: the run's or preset's.")] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="semi2k, aby3 or cheetah; repeatable; default: semi2k and aby3.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="For presets whose tokenizer is on the Hub.")] = None,
    blocks_only: Annotated[
        bool, typer.Option("--blocks-only", help="Leave embedding, final norm and unembedding out.")
    ] = False,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Run each whole model under encryption; for small trained models.")
    ] = False,
    with_alternatives: Annotated[
        bool, typer.Option("--alternatives/--no-alternatives", help="Measure every norm and activation too.")
    ] = True,
    network: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MBIT_PER_SECOND,DELAY_MS for projections; default: LAN=1000,0.5 and WAN=100,20."),
    ] = None,
    field: Annotated[str, typer.Option(help="Ring of the shares: fm64 or fm128.")] = "fm64",
    fraction_bits: Annotated[int, typer.Option(help="Bits behind the binary point.")] = 18,
    runs: Annotated[int, typer.Option(help="Runs for the median of the seconds.")] = 3,
    timeout: Annotated[int, typer.Option(help="Seconds that one program may take.")] = 600,
    engine_python: Annotated[
        Path | None,
        typer.Option(help="Python of the engine's environment; default: $NORMFREE_ENGINE_PYTHON or .venv-private."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for CSV files, figures and the report; default private-cost/MODEL.", callback=checked_folder
        ),
    ] = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """What models cost under secure multi-party computation: bytes, messages and seconds of each operation, in SPU.

    Example: normfree private-cost studies/relu-revival-cpu/runs/*/seed-0 --sequence-length 128 --end-to-end
    """
    import pandas as pd

    from normfree.errors import InputError, unknown_name
    from normfree.private import (
        NETWORKS,
        PROTOCOLS,
        EngineError,
        Measurer,
        Settings,
        find_engine,
        parse_network,
    )
    from normfree.studies.private_cost import (
        open_models,
        price,
        price_alternatives,
        price_blocks,
        run_end_to_end,
        totals,
    )
    from normfree.studies.private_cost_page import PrivateCosts, write_private_costs

    console = open_console(json_)
    for source in models:
        if models.count(source) > 1:
            raise InputError(f"{source} is given twice; give each model once")
    names = list(dict.fromkeys(name.lower() for name in protocol or ("semi2k", "aby3")))
    for name in names:
        if name not in PROTOCOLS:
            raise unknown_name("protocol", name, PROTOCOLS)
    settings = [Settings(PROTOCOLS[name], field.lower(), fraction_bits, runs, timeout) for name in names]
    networks = [parse_network(text) for text in network] if network else list(NETWORKS)
    engine = find_engine(engine_python)
    priced = open_models(
        {source: model_name(source, models) for source in models},
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        blocks_only=blocks_only,
        needs_weights=end_to_end,
    )
    folder = output_folder(out, "private-cost", models)
    measurers = [Measurer(engine, each, cache_dir / "private-cost") for each in settings]
    try:
        with console.status("") as status:

            def show(text: str) -> None:
                status.update(text)

            operations = pd.concat(
                [price(each, measurers, blocks_only=blocks_only, progress=show) for each in priced], ignore_index=True
            )
            blocks = pd.concat([price_blocks(each, measurers, progress=show) for each in priced], ignore_index=True)
            others = price_alternatives(priced[0], measurers, progress=show) if with_alternatives else None
            whole = None
            if end_to_end:
                whole = pd.concat(
                    [run_end_to_end(each, measurers, progress=show) for each in priced], ignore_index=True
                )
    except EngineError as error:
        print(f"normfree: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    costs = PrivateCosts(operations, totals(operations, priced, networks), blocks, others, whole)
    weights = quantized({model_name(source, models): source for source in models})
    write_private_costs(
        costs,
        folder,
        settings=settings,
        networks=networks,
        sequence_lengths=[each.T for each in priced],
        engine_version=engine.version,
        command=f"normfree private-cost {' '.join(models)}",
        quantized=weights,
    )
    if json_:
        frames = {
            name: json.loads(frame.to_json(orient="records", double_precision=9))
            for name, frame in costs.by_name().items()
        }
        print(json.dumps({"folder": str(folder), "quantization": weights, **frames}))
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["MB", "messages", *(f"{each.name} s" for each in networks), "norms %", "activations %", "perplexity"]
    for i, column in enumerate(["model", "protocol", "part", *columns]):
        shown.add_column(column, justify="left" if i < 3 else "right")
    for row in costs.totals.to_dict("records"):
        seconds = [f"{row[f'{each.name}_seconds']:,.1f}" for each in networks]
        shares = [f"{row.get(f'{group}_percent', 0.0):.1f}" for group in ("norm", "activation")]
        shown.add_row(
            row["model"],
            row["protocol"],
            row["part"],
            f"{row['bytes_sent'] / 1e6:,.1f}",
            f"{row['messages_sent']:,.0f}",
            *seconds,
            *shares,
            f"{row['eval_ppl']:.1f}" if row["eval_ppl"] == row["eval_ppl"] else "–",
        )
    console.print(shown)
    say_quantized(console, weights)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
