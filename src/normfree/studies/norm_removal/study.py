"""Norm removal over architectures and seeds ("Transformers Don't Need LayerNorm at Inference Time", Table 1).

A model without norms is compared with the one it was made from, and with the same fine-tuning with the norms kept.
"""

from __future__ import annotations

import json

import pandas as pd

from normfree.columns import LOSS_NATS, TRAIN_LOSS
from normfree.files import write_text
from normfree.modeling import NormfreeConfig
from normfree.removal.layout import NORM_FREE, REMOVAL_FILE, REMOVAL_FOLDER, VANILLA
from normfree.report import Callout, Element, Link, Section, Table, load_published
from normfree.report.numbers import plus_minus
from normfree.runner import Configuration, Findings, Preset, RemovalOptions, Study, StudyPage
from normfree.studies.norm_removal.figures import removal_loss_curves
from normfree.studies.norm_removal.removing import DEFAULT, measurement, options, removals_frame
from normfree.studies.norm_removal.tables import (
    at_best_rates,
    estimate,
    formatted_removals,
    published_removals,
    removal_table,
)
from normfree.training.objectives import CROSS_ENTROPY
from normfree.training.records import METRICS_FILE

PAPERS = (Link("Transformers Don't Need LayerNorm at Inference Time, 2025", "https://arxiv.org/abs/2507.02559"),)
REMOVALS_FILE = "removals.csv"
CURVE = {VANILLA: TRAIN_LOSS, NORM_FREE: CROSS_ENTROPY}
"""The names of the training loss in a run's metrics."""
FOLDERS = {VANILLA: VANILLA, NORM_FREE: REMOVAL_FOLDER}

GPT_2 = Configuration(
    "GPT-2 style",
    {
        "norm": "layernorm",
        "final_norm": "layernorm",
        "activation": "gelu_tanh",
        "attention_bias": "all",
        "mlp_bias": True,
        "scale_residual_init": True,
    },
)
PYTHIA = Configuration(
    "Pythia style",
    {
        "norm": "layernorm",
        "final_norm": "layernorm",
        "activation": "gelu",
        "attention_bias": "all",
        "mlp_bias": True,
        "parallel_residual": True,
        "position": "rotary",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
)


def llama(n_embd: int) -> Configuration:
    """Its feed-forward network has as many weights as a dense one of width 4 ``n_embd``."""
    return Configuration(
        "Llama style",
        {
            "norm": "rmsnorm",
            "final_norm": "rmsnorm",
            "activation": "silu",
            "ffn": "gated",
            "n_inner": 8 * -(-n_embd // 3),
            "attention_bias": "none",
            "mlp_bias": False,
            "position": "rotary",
            "tie_word_embeddings": False,
        },
    )


def configurations(preset: Preset) -> tuple[Configuration, ...]:
    """A GPT-2, a Pythia and a Llama of the preset's size."""
    return (GPT_2, PYTHIA, llama(int(preset.model.get("n_embd", NormfreeConfig.n_embd))))


def describe(page: StudyPage) -> Findings:
    """The table of the paper with intervals, the published one, and the loss while the norms go."""
    removals = removals_frame(page.results, options(page.folder.preset), DEFAULT)
    write_text(page.path / REMOVALS_FILE, removals.to_csv(index=False, na_rep="nan"))
    limits = trained_on(page)
    if removals.empty:
        return Findings("No norm has been removed yet.", [], limits)
    table = removal_table(removals)
    blocks: list[Element] = [
        Table(
            formatted_removals(table),
            "Evaluation loss in nats per token: the model as it was trained, fine-tuned with its norms kept (vanilla), "
            "and without any norm; each variant at its own best learning rate.",
            notes=[*TABLE_NOTES, "Rates: of vanilla and norm-free."],
        ),
        Table(
            published_removals(load_published("ln_removal_gpt2_cross_entropy")),
            "Published, not measured here: the same losses on OpenWebText (arXiv 2507.02559), one run each.",
        ),
    ]
    blocks += at_the_edge(removals, options(page.folder.preset))
    sections = [Section("Without norms", blocks)]
    curves = _curves(page, removals)
    if curves is not None:
        figure = page.figure(
            "removal-loss",
            removal_loss_curves(*curves),
            "Training loss while the norms go, at the largest budget, each variant at its best rate; one seed. Below: "
            "the difference on the same batches. Above: before which steps what was removed.",
        )
        sections.append(Section("While the norms go", [figure]))
    return Findings(_lead(table), sections, limits + _LIMITS)


TABLE_NOTES = (
    "± is half of a 95 % t-interval over seeds; differences are those of the same seed.",
    "A rate is the best if the mean loss over all seeds is lowest there, for each configuration and budget; it is "
    "chosen on the losses that are shown.",
)
_LIMITS = (
    " The norms of every model go by one schedule, scaled to its depth and budget; none was tuned. A small model after "
    "a short training says nothing of the published models."
)


def at_the_edge(removals: pd.DataFrame, grid: RemovalOptions) -> list[Element]:
    """A warning where a best rate is the smallest or largest that was tried, so that a better one may lie beyond."""
    best = at_best_rates(removals)
    at_edge = best[best["learning_rate"].isin([min(grid.learning_rates), max(grid.learning_rates)])]
    if at_edge.empty:
        return []
    named = at_edge[["configuration", "share", "variant"]].drop_duplicates()
    listed = ", ".join(f"{name} {variant} at {100 * share:g} %" for name, share, variant in named.to_numpy())
    return [Callout(f"The best rate is the smallest or the largest of those that were tried: {listed}.", "warning")]


def trained_on(page: StudyPage) -> str:
    """How long the models were trained before their norms went."""
    row = page.results[0].row
    return (
        f"The models were trained on {int(row['tokens']):,} tokens ({row['epochs']:.2f} epochs) before the removal. "
        "Losses are comparable only between rows of one table: another tokenizer or corpus changes them."
    )


def _curves(page: StudyPage, removals: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The frames of :func:`removal_loss_curves`, of the first seed at the largest budget.

    None where no removal got to its end.
    """
    best = at_best_rates(removals)
    curves, removed = [], []
    for result in page.results:
        configuration, seed = result.row["configuration"], result.row["seed"]
        own = best[(best["configuration"] == configuration) & best["learning_rate"].notna()]
        own = own[(own["share"] == own["share"].max()) & (own["seed"] == own["seed"].min())]
        for variant, share, rate in own.loc[own["seed"] == seed, ["variant", "share", "learning_rate"]].to_numpy():
            folder = DEFAULT.place(result.folder, share, rate) / FOLDERS[variant]
            metrics = pd.read_parquet(folder / METRICS_FILE)
            loss = metrics.loc[metrics["name"] == CURVE[variant], ["step", "value"]]
            curves.append(
                loss.rename(columns={"value": LOSS_NATS}).assign(configuration=configuration, variant=variant)
            )
            if variant == NORM_FREE:
                steps = pd.DataFrame(json.loads((folder / REMOVAL_FILE).read_text())["removals"])
                removed.append(steps.assign(configuration=configuration))
    if not removed:
        return None
    return pd.concat(curves, ignore_index=True), pd.concat(removed, ignore_index=True)


def _lead(table: pd.DataFrame) -> str:
    """How far the norm-free models are behind."""
    sentences = [
        f"{row['configuration']}, {100 * row['share']:g} % of the training tokens: without norms "
        f"{plus_minus(estimate(row, 'to_vanilla'), '+.4f')} nats to the same fine-tuning with norms, "
        f"{plus_minus(estimate(row, 'to_original'), '+.4f')} to the model before."
        for row in table.to_dict("records")
    ]
    return " ".join(sentences) + " Published for GPT-2 Small: +0.0671 and \N{MINUS SIGN}0.0209."


STUDY = Study(
    name="norm-removal",
    title="Norms taken out by fine-tuning",
    question="What does taking every norm out of a trained model cost? Runs: models, before their removals.",
    presets=("removal-smoke", "removal-cpu"),
    baseline=GPT_2.label,
    configurations=configurations,
    describe=describe,
    measurement=measurement(configurations, DEFAULT),
    papers=PAPERS,
)
