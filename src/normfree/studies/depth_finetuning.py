"""Does the gain of LayerNorm Scaling carry over to supervised fine-tuning, as "The Curse of Depth" (2025) says?

Every pre-trained model is fine-tuned on the same prompts and completions: signatures with docstrings, and bodies, of
functions in the study's own training documents.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from normfree.columns import EVAL_LOSS
from normfree.data import DataConfig, PackedData
from normfree.data.corpus import open_corpus
from normfree.data.function_pairs import function_pairs
from normfree.errors import InputError
from normfree.files import write_text
from normfree.report import Section, Table
from normfree.report.frames import in_order
from normfree.report.intervals import Estimate, mean_confidence_interval
from normfree.report.numbers import number, plus_minus
from normfree.runner import Configuration, Findings, Measurement, Preset, Study, StudyPage, measured_frame
from normfree.studies import curse_of_depth
from normfree.studies.curse_of_depth import LNS, PRE_LN, configurations, scale_limits
from normfree.training import RunResult, StudyProgress, load_pretrained, load_run_config, train
from normfree.training.evaluation import loss_on
from normfree.training.finetuning import finetuning_run
from normfree.training.run_folder import CONFIG_FILE

COMPARED = (PRE_LN, f"{PRE_LN}, scaled init", LNS)
PAIRS = 20_000
"""At most so many; each once."""
SHARE = 0.25
"""Of the steps of pre-training: those of fine-tuning."""
PAIRS_FILE, TOKENS_FOLDER = "pairs.jsonl", "tokens"
FOLDER, FINETUNED_FILE = "finetuned", "finetuned.csv"
BEFORE, AFTER = "before", "after"
"""Loss of the completions, nats per token, before and after fine-tuning."""
LOSSES = {EVAL_LOSS: "Pre-training", BEFORE: "Completions, before", AFTER: "Completions, after"}


def check(config: DataConfig) -> None:
    """Checks that there is something to fine-tune on.

    Raises:
        InputError: the corpus has no documented Python functions.
    """
    if not any(True for each in open_corpus(config).documents("train") for _ in function_pairs(each)):
        raise InputError(
            f"corpus {config.corpus!r} has no Python functions with docstrings; depth-finetuning takes them for prompts"
        )


def measure(result: RunResult, data: PackedData, console: Console) -> None:
    """Fine-tunes a finished run in its folder, and writes ``finetuned.csv``: before, after (nats per token).

    A run that diverged is not fine-tuned.
    """
    path = result.folder / FINETUNED_FILE
    if path.exists() or result.row["status"] != "finished":
        return
    pairs = _pairs(result, result.folder.parents[2])
    loaded = load_pretrained(str(result.folder))
    steps = max(1, round(SHARE * int(result.row["steps"])))
    changes = {"data.corpus": f"pairs:{pairs}", "recipe.steps": steps, "recipe.eval_steps": steps}
    seed = int(result.row["seed"])
    run, prompts = finetuning_run(loaded, pairs.parent / TOKENS_FOLDER, changes=changes, epochs=1, seed=seed)
    before = loss_on(loaded.model, prompts.eval)
    n_token = run.recipe.n_tokens(run.data.sequence_length)
    name = f"{result.row['configuration']} seed {seed}: fine-tuning"
    with StudyProgress(n_token, name) as progress:
        tuned = train(run, prompts, result.folder / FOLDER, callbacks=(progress.run(name, n_token),))
    table = pd.DataFrame([{BEFORE: before, AFTER: tuned.row[EVAL_LOSS]}])
    write_text(path, table.to_csv(index=False, na_rep="nan"))


def _pairs(result: RunResult, study: Path) -> Path:
    """The pairs of the study, written by the first run that needs them."""
    path = study / "pairs" / PAIRS_FILE
    if not path.exists():
        config: DataConfig = load_run_config(result.folder / CONFIG_FILE).data
        documents = open_corpus(config).documents("train")
        found = islice((pair for each in documents for pair in function_pairs(each)), PAIRS)
        write_text(path, "".join(json.dumps(pair) + "\n" for pair in found))
    return path


def gains(losses: pd.DataFrame) -> pd.DataFrame:
    """By how many nats each configuration is below the baseline of the same seed; NaN where a run diverged.

    Args:
        losses: configuration, seed, eval_loss, before, after.

    Returns:
        A row a configuration but the baseline: configuration, seeds, and an
        :class:`~normfree.report.intervals.Estimate` for each of the three losses.
    """
    by_seed = losses.set_index(["configuration", "seed"])[list(LOSSES)]
    baseline = by_seed.loc[PRE_LN]
    rows = []
    for name in in_order(losses["configuration"]):
        own = by_seed.loc[name]
        seeds = own.index.intersection(baseline.index)
        if name != PRE_LN and len(seeds):
            differences = baseline.loc[seeds] - own.loc[seeds]
            estimates = {each: mean_confidence_interval(differences[each].to_numpy(np.float64)) for each in LOSSES}
            rows.append({"configuration": name, "seeds": len(seeds), **estimates})
    return pd.DataFrame(rows, columns=["configuration", "seeds", *LOSSES])


def formatted(losses: pd.DataFrame) -> pd.DataFrame:
    """For readers: losses of the baseline, and what the others gain on it."""
    own = losses[losses["configuration"] == PRE_LN]
    means = {each: mean_confidence_interval(own[each].to_numpy(np.float64)) for each in LOSSES}
    rows = [{"Configuration": PRE_LN, **{name: plus_minus(means[each], ".3f") for each, name in LOSSES.items()}}]
    for row in gains(losses).to_dict("records"):
        cells = {name: plus_minus(row[each], "+.3f") for each, name in LOSSES.items()}
        rows.append({"Configuration": f"gain of {row['configuration']}", **cells})
    return pd.DataFrame(rows)


def describe(page: StudyPage) -> Findings:
    """Losses of pre-training and of completions, and the gains on Pre-LN."""
    measured, missing = page.measured(FINETUNED_FILE)
    if PRE_LN not in {each.row["configuration"] for each in measured}:
        return Findings(f"No run of {PRE_LN} is fine-tuned yet.", missing, scale_limits(page))
    finetuned = measured_frame(measured, FINETUNED_FILE)
    losses = finetuned.assign(**{EVAL_LOSS: [each.row[EVAL_LOSS] for each in measured]})
    caption = (
        f"Loss of {PRE_LN} in nats per token, and by how much the others are lower, ± 95 % t-interval over seeds: on "
        "the corpus after pre-training, and on completions of held-out prompts before and after fine-tuning."
    )
    section = Section("Before and after fine-tuning", [Table(formatted(losses), caption), page.loss_figure()])
    return Findings(_lead(gains(losses)), [section, *missing], scale_limits(page) + _LIMITS)


_LIMITS = (
    " The score is the loss of completions, and no downstream task. Fine-tuning is at one learning rate, and its "
    "documents were seen in pre-training, without the split into prompt and completion."
)


def _lead(found: pd.DataFrame) -> str:
    """Each gain before and after, and whether it stays."""
    if found.empty:
        return "Only the baseline has been trained yet."
    told = [
        f"{row['configuration']} gains {_gain(row[EVAL_LOSS])} nats on {PRE_LN} in pre-training, "
        f"{_gain(row[BEFORE])} on completions before fine-tuning, and {_gain(row[AFTER])} after"
        for row in found.to_dict("records")
    ]
    return "; ".join(told) + "."


def _gain(estimate: Estimate) -> str:
    return number(estimate.mean, "+.3f")


def _compared(preset: Preset) -> tuple[Configuration, ...]:
    return tuple(each for each in configurations(preset) if each.label in COMPARED)


STUDY = Study(
    name="depth-finetuning",
    title="The Curse of Depth: LayerNorm Scaling and supervised fine-tuning",
    question="Does the gain of LayerNorm Scaling carry over to fine-tuning?",
    baseline=PRE_LN,
    configurations=_compared,
    describe=describe,
    measurement=lambda preset: Measurement(lambda: check(preset.data), measure),
    presets=("smoke", "cpu", "depth-12", "depth-24", "depth-48"),
    papers=curse_of_depth.STUDY.papers,
)
