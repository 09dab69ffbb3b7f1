"""How many fine-tuning tokens the removal of norms takes, by model size: fewer than in proportion to its parameters, as
"Transformers Don't Need LayerNorm at Inference Time" suggests?
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import pandas as pd
import torch

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.removal.layout import NORM_FREE, ORIGINAL
from normfree.report import Element, Section, Table
from normfree.runner import Configuration, Findings, Preset, Study, StudyPage, run_config
from normfree.studies.norm_removal.figures import removal_scaling
from normfree.studies.norm_removal.removing import Way, measurement, options, removals_frame
from normfree.studies.norm_removal.study import GPT_2, PAPERS, REMOVALS_FILE, TABLE_NOTES, at_the_edge, trained_on
from normfree.studies.norm_removal.tables import (
    PowerLaw,
    at_best_rates,
    formatted_removals,
    power_law,
    removal_table,
    tokens_to_reach,
)

SIZES = ("n_layer", "n_head", "n_embd")
SIZE_FACTORS = (0.5, 1.0, 1.5, 2.0)
"""Of the preset's ``SIZES``, all at once: heads keep their width."""
THRESHOLD = 0.05
"""Nats above the loss of the model before the removal."""
REACHED_FILE = "tokens_to_threshold.csv"
ALONE = Way(NORM_FREE)


def configurations(preset: Preset) -> tuple[Configuration, ...]:
    """A GPT-2 at each size, by its factor.

    Raises:
        InputError: the preset's sizes cannot be halved.
    """
    sizes = {name: int(preset.model.get(name, getattr(NormfreeConfig, name))) for name in SIZES}
    if sizes["n_layer"] % 2 or sizes["n_head"] % 2 or sizes["n_embd"] % sizes["n_head"]:
        raise InputError(
            f"norm-removal-scaling halves n_layer ({sizes['n_layer']}) and n_head ({sizes['n_head']}) of its preset, "
            f"with heads of one width (n_embd {sizes['n_embd']}); use even numbers, and n_embd divisible by n_head"
        )
    return tuple(
        Configuration(
            f"size {factor:g}", {**GPT_2.model, **{name: int(factor * value) for name, value in sizes.items()}}
        )
        for factor in SIZE_FACTORS
    )


def describe(page: StudyPage) -> Findings:
    """The loss by budget and size, the tokens to the threshold, and the power law through them."""
    grid = options(page.folder.preset)
    removals = removals_frame(page.results, grid, ALONE)
    write_text(page.path / REMOVALS_FILE, removals.to_csv(index=False, na_rep="nan"))
    limits = trained_on(page)
    if removals.empty:
        return Findings("No norm has been removed yet.", [], limits)
    excess = _excess(page, removals)
    reached = _reached(excess)
    write_text(page.path / REACHED_FILE, reached.to_csv(index=False, na_rep="nan"))
    known = reached[reached["bound"] == "interpolated"]
    fit = power_law(known["parameters"].tolist(), known["tokens"].tolist())
    figure = page.figure(
        "removal-scaling",
        removal_scaling(excess, reached, fit, threshold=THRESHOLD),
        "Left: loss of the norm-free model above the original's by fine-tuning budget, at the best rate, a line a size "
        f"and seed. Right: tokens to within {THRESHOLD:g} nats, interpolated on their logarithm between budgets, each "
        "of which has a schedule of its own.",
    )
    shown = formatted_removals(removal_table(removals)).drop(columns=["Vanilla", "To vanilla"])
    shown["Rates"] = [each.split(", ")[1] for each in shown["Rates"]]
    blocks: list[Element] = [
        figure,
        Table(shown.rename(columns={"Rates": "Rate"}), "Evaluation loss in nats per token.", notes=TABLE_NOTES),
        Table(
            reached.drop(columns="parameters"),
            f"Fine-tuning tokens to within {THRESHOLD:g} nats of the original.",
            formats={"tokens": ",.0f"},
            notes=["At most: the smallest budget is enough, or the one below diverged. More than: the largest is not."],
        ),
        *at_the_edge(removals, grid),
    ]
    return Findings(_lead(reached, fit), [Section("Tokens by size", blocks)], limits + _LIMITS)


def _excess(page: StudyPage, removals: pd.DataFrame) -> pd.DataFrame:
    """size, parameters (without embeddings), seed, finetuning_tokens, excess_nats: the best rate of each budget."""
    parameters = {each.label: _parameters(page.folder.preset, each) for each in configurations(page.folder.preset)}
    best = at_best_rates(removals)
    key = ["configuration", "share", "seed"]
    original = best[best["variant"] == ORIGINAL].set_index(key)[EVAL_LOSS]
    rows = best[best["variant"] == NORM_FREE].set_index(key)
    excess = (rows[EVAL_LOSS] - original).rename("excess_nats")
    frame = rows[["finetuning_tokens"]].join(excess).reset_index().rename(columns={"configuration": "size"})
    return frame.assign(parameters=frame["size"].map(parameters)).drop(columns="share")


def _reached(excess: pd.DataFrame) -> pd.DataFrame:
    """size, parameters, seed, tokens, bound."""
    rows: list[dict[str, Any]] = []
    for (parameters, size, seed), budgets in excess.groupby(["parameters", "size", "seed"]):
        found = tokens_to_reach(budgets["finetuning_tokens"].tolist(), budgets["excess_nats"].tolist(), THRESHOLD)
        row = {"size": size, "parameters": parameters, "seed": seed, "tokens": found.tokens, "bound": found.bound}
        rows.append(row)
    return pd.DataFrame(rows)


def _parameters(preset: Preset, configuration: Configuration) -> int:
    model = run_config(preset, configuration, preset.seeds[0]).build_model_config(preset.data.vocab_size)
    with torch.device("meta"):
        return int(NormfreeForCausalLM(model).num_parameters(exclude_embeddings=True))


def _lead(reached: pd.DataFrame, fit: PowerLaw) -> str:
    """The exponent and what it says."""
    censored = reached[reached["bound"] != "interpolated"]
    sentences = []
    if isfinite(fit.exponent):
        interval = f" (95 % interval {fit.low:.2f} to {fit.high:.2f}, {fit.n} points)" if isfinite(fit.low) else ""
        sentences.append(
            f"The fine-tuning tokens to within {THRESHOLD:g} nats of the original grow as parameters to the power "
            f"{fit.exponent:.2f}{interval}: {_verdict(fit)}."
        )
    else:
        sentences.append("Too few sizes came to the threshold between two budgets for a power law.")
    if len(censored):
        listed = ", ".join(
            f"{row['size']} seed {row['seed']} ({row['bound']} {row['tokens']:,.0f})"
            for row in censored.to_dict("records")
        )
        sentences.append(f"Censored, and not in the fit: {listed}.")
    return " ".join(sentences)


def _verdict(fit: PowerLaw) -> str:
    if fit.high < 1:
        return "sublinear"
    return "superlinear" if fit.low > 1 else "whether it is sublinear these runs do not decide"


_LIMITS = (
    " All sizes were trained on as many tokens, so the larger ones less for their size. The fit leaves out sizes that "
    "no budget was small or large enough for, which bends it; parameters are counted without embeddings."
)
STUDY = Study(
    name="norm-removal-scaling",
    title="Fine-tuning tokens to take the norms out, by model size",
    question="How many tokens does a removal need, by the size of the model?",
    presets=("removal-smoke", "removal-scaling-cpu"),
    baseline="size 1",
    configurations=configurations,
    describe=describe,
    measurement=measurement(configurations, ALONE),
    papers=PAPERS,
)
