"""``normfree to-spark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.console import open_console, print_json, say, say_origin
from normfree.cli.options import Device, Dtype, Json, Model, Revision, at_revision, checked_folder, count_or_share


def to_spark(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the sparse model and its tokenizer.", callback=checked_folder)],
    ffn: Annotated[bool, typer.Option(help="Make the feed-forward networks sparse.")] = True,
    attention: Annotated[bool, typer.Option(help="Make attention sparse.")] = True,
    ffn_active: Annotated[
        str | None, typer.Option(help="Neurons computed for a token: a count, or a share such as 0.08.")
    ] = None,
    ffn_predictor_dim: Annotated[
        str | None, typer.Option(help="Dimensions that choose them: a count or a share; default: half.")
    ] = None,
    attention_active: Annotated[
        str | None, typer.Option(help="Keys attended to at most: a count, or a share of the positions; default: 256.")
    ] = None,
    attention_predictor_dim: Annotated[
        str | None, typer.Option(help="Dimensions of a head that choose them; default: half.")
    ] = None,
    topk: Annotated[str | None, typer.Option(help="statistical (default) or exact.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    json_: Json = False,
) -> None:
    """Turn a trained dense model into a sparse one to train on: the start_from of a run.

    The sparse model has the dense one's weights and another function; it is of no use before it is trained.

    Example: normfree to-spark studies/relu-revival-cpu/runs/sm-ln-g/seed-0 --out spark --ffn-active 0.08
    """
    from normfree.exports import export_spark

    (model,) = at_revision([model], revision)
    console = open_console(json_)
    spark = export_spark(
        model,
        out,
        ffn=ffn,
        attention=attention,
        ffn_active=count_or_share("--ffn-active", ffn_active),
        ffn_predictor_dim=count_or_share("--ffn-predictor-dim", ffn_predictor_dim),
        attention_active=count_or_share("--attention-active", attention_active),
        attention_predictor_dim=count_or_share("--attention-predictor-dim", attention_predictor_dim),
        topk=topk,
        device=device,
        dtype=dtype,
    )
    if json_:
        sizes = {"parameters": spark.parameters, "dense_parameters": spark.parameters_before}
        print_json(folder=str(out), **sizes, quantization=spark.quantization, loaded_as=spark.loaded_as)
        return
    say_origin(console, {model: spark.quantization}, {model: spark.loaded_as})
    say(
        console,
        f"{out}: {spark.parameters:,} parameters, {spark.parameters_before:,} in the dense model; train it with "
        f"start_from: {out}",
    )
