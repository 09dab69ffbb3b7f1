"""``normfree bench NAME``: a group of commands, one for each module of :mod:`normfree.benchmarks`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from normfree.cli.bench_tables import TABLES, entropy_table
from normfree.cli.console import open_console, say
from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Json, checked_file, numbers
from normfree.errors import InputError
from normfree.files import write_text
from normfree.progress import stage

bench = typer.Typer(
    help="Measure what this package costs in time and memory, on this machine.",
    rich_markup_mode=None,
)

Batch = Annotated[int, typer.Option(help="Sequences at once.")]
Compile = Annotated[bool, typer.Option("--compile", help="With torch.compile.")]
Dtype = Annotated[str | None, typer.Option(help="fp32 or bf16; default: fp32 on a CPU, bf16 on a GPU.")]
Heads = Annotated[int, typer.Option(help="Heads, of 64 dimensions each; the width follows.")]
Layers = Annotated[int, typer.Option(help="Layers of the model.")]
Out = Annotated[Path | None, typer.Option(help="File for the result, as JSON; default: none.", callback=checked_file)]
PresetName = Annotated[str, typer.Option(help="A preset's name, or a YAML file of the same form.")]
Rounds = Annotated[int, typer.Option(help="Rounds; each runs every variant once, in a new order.")]
Tokens = Annotated[int, typer.Option(help="Tokens of a sequence.")]


@bench.command()
def entropy(
    tokens: Annotated[
        str | None, typer.Option(help="Comma-separated lengths, e.g. 512,4096; default: seven, from 128 on.")
    ] = None,
    batch: Batch = 1,
    heads: Annotated[int | None, typer.Option(help="Heads; default: 4 on a CPU, 16 on a GPU.")] = None,
    head_dim: Annotated[int, typer.Option(help="Dimensions of a head.")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: fp32 on a CPU, bf16 on a GPU.")
    ] = None,
    rounds: Rounds = 7,
    eager_gib: Annotated[
        float, typer.Option(help="Leave eager out at lengths where its matrices would need more GiB.")
    ] = 8.0,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Attention entropy: every backend's time and memory, against materialised scores and attention alone.

    Shows each length as soon as it is measured; all of them take minutes. On a CPU the memory of each is that of
    fresh processes.

    Example: normfree bench entropy --tokens 512,4096 --rounds 3
    """
    console = open_console(json_)
    _run(
        "entropy",
        out,
        json_,
        tokens=None if tokens is None else numbers("--tokens", tokens, "512,4096"),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        rounds=rounds,
        eager_gib=eager_gib,
        on_length=lambda found: console.print(entropy_table(found)),
    )


@bench.command()
def training(
    preset: PresetName = "cpu",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, with as many in a step; default: as the preset has it.")
    ] = None,
    rounds: Rounds = 7,
    steps: Annotated[int, typer.Option(help="Training steps of a variant in a round.")] = 5,
    peak_size: Annotated[
        int, typer.Option(help="Side of the square matrices whose product is taken for the device's peak.")
    ] = 2048,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Speed and peak memory of Normfree's training step, with and without telemetry, against Hugging Face's GPT-2.

    Example: normfree bench training --preset cpu --tokens 1024 --rounds 9 --steps 4
    """
    _run("training", out, json_, preset=preset, tokens=tokens, rounds=rounds, steps=steps, peak_size=peak_size)


@bench.command()
def step_cost(
    group: Annotated[str, typer.Argument(help="norms (norms and placements) or spark (sparse layers).")],
    layers: Layers = 6,
    heads: Heads = 4,
    tokens: Tokens = 128,
    batch: Batch = 16,
    vocabulary: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 4096,
    dtype: Dtype = None,
    compile_: Compile = False,
    rounds: Rounds = 15,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A variant to compare with the usual model, e.g. 'pre, dyt'; repeatable; default: all."),
    ] = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Time of a training step with each norm and placement, or with sparse layers, against the usual model.

    Example: normfree bench step-cost norms --compile --only 'pre, dyt'
    """
    sizes = {"layers": layers, "heads": heads, "tokens": tokens, "batch": batch, "vocabulary": vocabulary}
    how = {"dtype": dtype, "compiled": compile_, "rounds": rounds, "only": only}
    _run("step_cost", out, json_, group=group, **sizes, **how)


@bench.command()
def norm_free_inference(
    layers: Layers = 12,
    heads: Heads = 12,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    batch: Batch = 1,
    vocabulary: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 50257,
    dtype: Dtype = None,
    compile_: Compile = False,
    rounds: Rounds = 15,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Prefill and decode of a model whose norms were taken out, against the LayerNorm model it was made from.

    Example: normfree bench norm-free-inference --tokens 512 --compile
    """
    sizes = {"layers": layers, "heads": heads, "tokens": tokens, "batch": batch, "vocabulary": vocabulary}
    _run("norm_free_inference", out, json_, **sizes, dtype=dtype, compiled=compile_, rounds=rounds)


@bench.command()
def sparse_decode(
    subject: Annotated[str, typer.Argument(help="ffn (one feed-forward network) or model (a whole one).")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of CPU threads, e.g. 1,2.")] = "1",
    rounds: Rounds = 20,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 2304,
    dense_inner: Annotated[
        int, typer.Option(help="Neurons of the model's dense network; of every network of ffn.")
    ] = 9216,
    layers: Annotated[int | None, typer.Option(help="Layers of the model; default: 26.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in the model's cache; default: 4096.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="The model's vocabulary; default: 256000.")] = None,
    inner: Annotated[
        int | None, typer.Option(help="Neurons of the model's sparse network; default: 13824, as many weights.")
    ] = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Decode that reads active neurons and attended tokens only, against dense decode.

    On a GPU, where there is one; on a CPU it needs the kernels that are compiled where normfree is installed with a C++
    compiler. The default sizes are those of Gemma-2 2B.

    Example: normfree bench sparse-decode model --dtype bf16 --rounds 6
    """
    sizes = {"layers": layers, "tokens": tokens, "vocabulary": vocabulary, "inner": inner}
    given = {name: size for name, size in sizes.items() if size is not None}
    if given and subject != "model":
        raise InputError(f"--{next(iter(given))} is for sparse-decode model, not for {subject}; leave it out")
    counts = numbers("--threads", threads, "1,2")
    how = {"dtype": dtype, "threads": counts, "rounds": rounds}
    _run("sparse_decode", out, json_, subject=subject, **how, width=width, dense_inner=dense_inner, **given)


@bench.command()
def pipeline(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(help="start, packing, evaluation, checkpoint, report, depth, interpret; default: all."),
    ] = None,
    preset: PresetName = "cpu",
    layers: Annotated[int, typer.Option(help="Layers of the model of depth and interpret.")] = 30,
    sequences: Annotated[int, typer.Option(help="Sequences that depth and interpret read.")] = 4,
    tokens: Tokens = 128,
    probes: Annotated[int, typer.Option(help="Random vectors a sequence for each Jacobian of depth.")] = 2,
    rounds: Rounds = 3,
    out: Out = None,
    json_: Json = False,
) -> None:
    """What surrounds the training step, from the start of a command to its report, each against its limit.

    Example: normfree bench pipeline packing checkpoint --rounds 9
    """
    sizes = {"layers": layers, "sequences": sequences, "tokens": tokens, "probes": probes}
    _run("pipeline", out, json_, subjects=subjects, preset=preset, **sizes, rounds=rounds)


@bench.command()
def long_run(
    preset: PresetName = "cpu",
    hours: Annotated[float, typer.Option(help="How long to train.")] = 2.0,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the process.")] = 20.0,
    run: Annotated[Path | None, typer.Option(help="Run folder, kept; default: a temporary one.")] = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Hours of training with telemetry in every step: do memory and open files stay, do tables grow as predicted?

    Example: normfree bench long-run --hours 2 --out long-run.json
    """
    _run("long_run", out, json_, preset=preset, hours=hours, every=every, run=run, cache_dir=cache_dir)


def _run(name: str, out: Path | None, json_: bool, **options: Any) -> None:
    """Runs a benchmark, writes its result to ``out`` if given, and prints it."""
    benchmark = getattr(import_module(f"normfree.benchmarks.{name}"), f"benchmark_{name}")
    console = open_console(json_)
    with stage(f"bench {name.replace('_', '-')}"):
        result = benchmark(**options)
    if out is not None:
        write_text(out, json.dumps(result, indent=2) + "\n")
    if json_:
        print(json.dumps(result))
        return
    for table in TABLES[name](result):
        console.print(table)
    say(console, f"{result['device']}, torch {result['torch']}, Python {result['python']}")
    if out is not None:
        say(console, f"File: {out}")
