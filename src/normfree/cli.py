"""The command line: ``normfree COMMAND``. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from normfree.errors import InputError

if TYPE_CHECKING:
    from normfree.studies import CollectionFolder, StudyPage

# A study never needs the hub unless it names a corpus or a tokenizer there; nor does it ever report usage to it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Deterministic matrix products on CUDA need this set before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

app = typer.Typer(
    name="normfree",
    help="What normalization, activation functions and sparsity do to a transformer language model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

CacheDir = Annotated[Path, typer.Option(help="Where tokenized corpora are kept and found again.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to standard output.")]
LOG_WIDTH = 110
INTERRUPTED = 130
DEFAULT_CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "normfree"


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="The study; a wrong name lists them all.")],
    preset: Annotated[str, typer.Option(help="The size: a preset's name, or a YAML file of the same form.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Study folder; default studies/NAME-PRESET.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated seeds, e.g. 0,1,2; default: the preset's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training budget of each run, in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training budget of each run, in optimizer steps.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="installed-python, directory:PATH[:GLOB], file:PATH, codeparrot or hf:NAME."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="'train', or a Hugging Face tokenizer's name or path.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change any value of the preset, e.g. --set model.n_layer=4. Can be repeated."),
    ] = None,
    tune_lr: Annotated[
        bool, typer.Option(help="Also give each configuration its own learning rate, from a short sweep.")
    ] = False,
    all_: Annotated[
        bool, typer.Option("--all", help="With relu-revival: every table and figure of the paper, all its models.")
    ] = False,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Train the configurations of a paper, compare them, and write tables, figures and a report.

    A study that was stopped goes on where it was when the same command is given again.

    Example: normfree study relu-revival --preset cpu --seeds 0,1,2
    """
    from normfree.studies import Preset, begin, load_preset

    if all_ and name != "relu-revival":
        raise InputError(f"--all is for relu-revival, not for {name}; leave it out")
    name = f"{name}-all" if all_ else name
    if tokens is not None and steps is not None:
        raise InputError("give --tokens or --steps, not both")
    options = {"recipe.tokens": tokens, "recipe.steps": steps, "data.corpus": corpus, "data.tokenizer": tokenizer}
    changes: dict[str, Any] = dict(_assignment(text) for text in set_ or [])
    changes |= {option: value for option, value in options.items() if value is not None}

    def changed(preset: Preset) -> Preset:
        return preset.with_changes(**changes)

    chosen_seeds = _seeds(seeds) if seeds is not None else None
    console = _console(json_)
    folder = out or Path("studies") / f"{name}-{Path(preset).stem}"
    begun = begin(name, folder, preset, changed)
    console.print(f"Study {name}, preset {Path(preset).stem}: {load_preset(preset).description}", highlight=False)
    begun.run(chosen_seeds, tune_lr=tune_lr, cache_dir=cache_dir, console=console)
    _write_report(begun, console, json_=json_)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, such as the config.yaml of an earlier run.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Train one configuration. A run that was stopped goes on from its last checkpoint.

    Example: normfree train studies/relu-revival-cpu/runs/sm-r/seed-0/config.yaml --out runs/again
    """
    from normfree.data import prepare_data
    from normfree.training import StudyProgress, load_run_config
    from normfree.training import train as train_run

    run = load_run_config(config)
    console = _console(json_)
    data = prepare_data(run.data, cache_dir, progress=console.is_terminal)
    n_tokens = run.recipe.n_tokens(run.data.sequence_length)
    label = f"{run.configuration} seed {run.seed}"
    with StudyProgress(n_tokens, console=console, description=run.model_name) as progress:
        result = train_run(run, data, out, callbacks=(progress.run(label, n_tokens),))
    if json_:
        print(json.dumps({"folder": str(out), **result.row}))
        return
    row = result.row
    console.print(
        f"{label}: evaluation loss {row['eval_loss']:.4f} nats per token, perplexity {row['eval_ppl']:.2f} "
        f"({row['status']}); {out}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def entropy(
    model: Annotated[str, typer.Argument(help="A Hub id, a model folder, or a run or checkpoint folder of ours.")],
    corpus: Annotated[
        str | None,
        typer.Option(help="As for a study; default, for a run: its own evaluation sequences."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's name or folder; default: the model's.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="T; default: the run's, or 512 or the model's positions.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV and figures; default entropy/MODEL.")] = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Measure the attention entropy of every head of a model: a table, a CSV file a head and layer, a heatmap.

    Example: normfree entropy gpt2 --corpus installed-python --sequence-length 256
    """
    from normfree.interpret import (
        measure_attention_entropy,
        token_sequences,
        write_attention_entropy,
    )
    from normfree.report import headwise_entropy_heatmaps, save_figure
    from normfree.training import load_pretrained

    measured = load_pretrained(model)
    tokens = token_sequences(
        measured,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=sequences,
        cache_dir=cache_dir,
    )
    console = _console(json_)
    with console.status(f"{len(tokens)} sequences of {tokens.shape[1]} tokens"):
        result = measure_attention_entropy(measured.model, tokens)
    name = Path(model).resolve().name if Path(model).exists() else model
    folder = out or Path("entropy") / name.replace("/", "--")
    write_attention_entropy(result, folder)
    frame = result.heads.assign(model=name, context_length=result.sequence_length, configuration=name, seed=0)
    save_figure(headwise_entropy_heatmaps(frame, maximum=result.uniform_bound), folder, "headwise_entropy")
    if json_:
        print(json.dumps({"folder": str(folder), **result.summary()}))
        return
    console.print(
        f"{name}: attention entropy in nats over {result.n_sequences} sequences of {result.sequence_length} tokens; "
        f"uniform attention has {result.uniform_bound:.3f}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "mean", "min", "max", "share of uniform", "sink share", "heads in top band"):
        table.add_column(column, justify="right")
    for row in result.layers.to_dict("records"):
        nats = (f"{row[column]:.3f}" for column in ("mean_nats", "min_nats", "max_nats"))
        shares = (f"{100 * row[column]:.1f} %" for column in ("share_of_uniform", "sink_share"))
        table.add_row(str(row["layer"]), *nats, *shares, f"{row['top_band_heads']} of {row['n_head']}")
    console.print(table)
    for module, reason in result.unreadable.items():
        console.print(f"not read: {module}: {reason}", highlight=False, soft_wrap=True)
    console.print(f"Files: {folder}", highlight=False, soft_wrap=True)


@app.command("remove-norm")
def remove_norm(
    model: Annotated[str, typer.Argument(help="A Hub id, a model folder, or a run or checkpoint folder of ours.")],
    corpus: Annotated[str | None, typer.Option(help="As for a study; default, for a run: its own.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's name or folder; default: the model's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and models; default removal/MODEL.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a YAML file; default: by depth and budget."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Fine-tuning budget, in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Fine-tuning budget, in optimizer steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data and of dropout.")] = 0,
    vanilla: Annotated[bool, typer.Option(help="Also fine-tune with the norms kept, as a control.")] = True,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change any value, e.g. --set recipe.learning_rate=3e-4. Can be repeated."),
    ] = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Take every LayerNorm or RMSNorm out of a trained model by fine-tuning, and export it without any.

    A removal that was stopped goes on where it was when the same command is given again.

    Example: normfree remove-norm studies/relu-revival-cpu/runs/sm-ln-g/seed-0
    """
    from normfree.data import prepare_data, same_data
    from normfree.removal import remove
    from normfree.removal.plan import plan
    from normfree.removal.schedule import load_schedule
    from normfree.training import StudyProgress, load_pretrained

    if tokens is not None and steps is not None:
        raise InputError("give --tokens or --steps, not both")
    options = {"recipe.tokens": tokens, "recipe.steps": steps, "data.corpus": corpus, "data.tokenizer": tokenizer}
    changes: dict[str, Any] = dict(_assignment(text) for text in set_ or [])
    changes |= {option: value for option, value in options.items() if value is not None}
    chosen = load_schedule(schedule) if schedule is not None else None
    loaded = load_pretrained(model)
    run = plan(loaded, changes=changes, seed=seed)
    console = _console(json_)
    if loaded.fingerprint is not None and run.data == loaded.data:
        data = same_data(run.data, cache_dir, loaded.fingerprint, progress=console.is_terminal)
    else:
        data = prepare_data(run.data, cache_dir, progress=console.is_terminal)
    del loaded  # the runs load it again
    name = Path(model).resolve().name if Path(model).exists() else model
    folder = out or Path("removal") / name.replace("/", "--")
    total = run.recipe.n_tokens(run.data.sequence_length) * (2 if vanilla else 1)
    with StudyProgress(total, console=console, description="remove-norm") as progress:
        result = remove(
            run,
            data,
            folder,
            chosen,
            vanilla=vanilla,
            callbacks=lambda variant, n_tokens: (progress.run(variant, n_tokens),),
        )
    if json_:
        exports = {"norm_free": str(result.norm_free), "gpt2": str(result.gpt2) if result.gpt2 else None}
        rows = json.loads(result.table.to_json(orient="records", double_precision=9))
        print(json.dumps({"folder": str(folder), **exports, "table": rows}))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("variant", "fine-tuning tokens", "loss, nats", "perplexity", "Δ loss"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in result.table.to_dict("records"):
        numbers = (f"{row['eval_loss']:.4f}", f"{row['eval_ppl']:.2f}", f"{row['delta_loss']:+.4f}")
        table.add_row(row["variant"], f"{row['finetuning_tokens']:,}", *numbers)
    console.print(table)
    console.print(f"Without norms: {result.norm_free}", highlight=False, soft_wrap=True)
    if result.gpt2 is not None:
        console.print(f"As a stock GPT-2: {result.gpt2}", highlight=False, soft_wrap=True)


@app.command()
def interpret(
    models: Annotated[list[str], typer.Argument(help="Hub ids, model folders, or runs of ours; compared on one page.")],
    corpus: Annotated[str | None, typer.Option(help="As for a study; default: the first run's own sequences.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's name or folder; default: the first model's.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="T; default: the first model's.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with clean, corrupted, answer, wrong_answer; default: induction prompts."),
    ] = None,
    neurons: Annotated[int, typer.Option(help="Candidate confidence neurons to ablate.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for CSV files, figures and the report.")] = Path("interpretation"),
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Direct logit attribution, patching, confidence neurons and sinks, of models with and without norms.

    Example: normfree interpret removal/seed-0/vanilla removal/seed-0/norm-free --corpus installed-python
    """
    from normfree.interpret import induction_pairs, read_prompts, token_sequences, tokenizer_of
    from normfree.studies.interpretation import interpret as interpret_model
    from normfree.studies.interpretation import write_interpretation
    from normfree.training import load_pretrained

    console = _console(json_)
    loaded = {_model_name(each, models): load_pretrained(each) for each in models}
    first = next(iter(loaded.values()))
    tokens = token_sequences(
        first,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=sequences,
        cache_dir=cache_dir,
    )
    if prompts is not None:
        pairs = read_prompts(prompts, tokenizer_of(first))
    else:
        pairs = induction_pairs(tokens, max(1, sequences // 2))
    found = {}
    for name, each in loaded.items():
        with console.status(f"{name}: {len(tokens)} sequences, {len(pairs.answers)} prompts, {neurons} neurons"):
            found[name] = interpret_model(each.as_normfree(), tokens, pairs, n_neuron=neurons)
    table = write_interpretation(found, out, f"normfree interpret {' '.join(models)}")
    if json_:
        rows = json.loads(table.to_json(orient="records", double_precision=9))
        print(json.dumps({"folder": str(out), "summary": rows}))
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        shown.add_column(column.replace("_", " "), justify="left" if column == "model" else "right")
    for row in table.to_dict("records"):
        shown.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    console.print(shown)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study.")],
    json_: Json = False,
) -> None:
    """Write the table, the figures and the report of a study again, from the runs that are finished.

    Example: normfree report studies/relu-revival-cpu
    """
    from normfree.studies import open_folder

    _write_report(open_folder(folder), _console(json_), json_=json_)


def _write_report(opened: StudyPage | CollectionFolder, console: Console, *, json_: bool) -> None:
    from normfree.report import to_console

    report_path = opened.write()
    if json_:
        rows = {name: json.loads(table.to_json(orient="records")) for name, table in opened.tables.items()}
        print(json.dumps({"folder": str(opened.path), **rows}))
        return
    for table in opened.tables.values():
        console.print(to_console(table))
    console.print(f"Report:  {report_path}\nFolder:  {opened.path}", highlight=False, soft_wrap=True)


def _console(json_: bool) -> Console:
    """Progress and tables; beside JSON they go to standard error. A log file is as wide as the tables."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings would break up the progress bars
    console = Console(stderr=json_)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--set {text!r} is not of the form NAME=VALUE, e.g. --set model.n_layer=4")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {name}: {value!r} is not a YAML value") from error


def _model_name(source: str, among: list[str]) -> str:
    """The last part of a path, or as many as tell it from the others; a Hub id as it is."""
    if not Path(source).exists():
        return source
    parts = Path(source).resolve().parts
    others = [Path(each).resolve().parts for each in among if each != source]
    n = next(n for n in range(1, len(parts) + 1) if all(each[-n:] != parts[-n:] for each in others) or n == len(parts))
    return "/".join(parts[-n:])


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds {text!r} is not a comma-separated list of numbers, e.g. 0,1,2") from error
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds {text!r}: seeds must be different numbers from 0")
    return seeds


def main() -> None:
    """Runs the command line, turning bad input into one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except typer.TyperException as error:
        _fail(f"{error.format_message()} (see: normfree --help)", 2)
    if code == INTERRUPTED:
        _fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"normfree: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
