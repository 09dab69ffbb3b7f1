"""``normfree to-spark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.options import Json, Model, checked_folder, open_console, say_quantized
from normfree.errors import InputError


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
    json_: Json = False,
) -> None:
    """Turn a trained dense model into a sparse one to go on training: the start_from of a run.

    The sparse model has the dense one's weights and another function; it is of no use before it is trained.

    Example: normfree to-spark studies/relu-revival-cpu/runs/sm-ln-g/seed-0 --out spark --ffn-active 0.08
    """
    from normfree.files import folder_written_whole
    from normfree.interpret import tokenizer_of
    from normfree.spark import to_spark as convert
    from normfree.training import load_pretrained

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; give another folder with --out")
    loaded = load_pretrained(model)
    dense = loaded.as_normfree()
    tokenizer = tokenizer_of(loaded)
    spark = convert(
        dense,
        ffn=ffn,
        attention=attention,
        ffn_active=_number("--ffn-active", ffn_active),
        ffn_predictor_dim=_number("--ffn-predictor-dim", ffn_predictor_dim),
        attention_active=_number("--attention-active", attention_active),
        attention_predictor_dim=_number("--attention-predictor-dim", attention_predictor_dim),
        topk=topk,
    )
    with folder_written_whole(out) as folder:
        spark.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    before, after = dense.num_parameters(), spark.num_parameters()
    if json_:
        sizes = {"parameters": after, "dense_parameters": before}
        print(json.dumps({"folder": str(out), **sizes, "quantization": loaded.quantization}))
        return
    console = open_console(json_)
    if loaded.quantization is not None:
        say_quantized(console, {model: loaded.quantization})
    console.print(
        f"{out}: {after:,} parameters, {before:,} in the dense model; train it with start_from: {out}",
        highlight=False,
        soft_wrap=True,
    )


def _number(option: str, text: str | None) -> int | float | None:
    """A count or a share."""
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give a count such as 256 or a share such as 0.08") from error
