"""Attention logits without LayerNorm, and with queries and keys that are normalized (QK normalization).

Large attention logits make attention one-hot and training unstable; normalizing queries and keys bounds them (Dehghani
et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023; Wortsman et al., "Small-scale proxies for
large-scale Transformer training instabilities", 2023).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.probes.optional.qk_logit_max import QK_LOGIT_MAX
from normfree.report import Link, Section, Table, paper_style
from normfree.report.frames import in_order
from normfree.report.primitives import depth_bar, layer_curves, panel_grid, title_panel
from normfree.runner import KEY, Configuration, Findings, Study, StudyPage, telemetry_frame
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU

RECIPE = {"probes": [QK_LOGIT_MAX]}

CONFIGURATIONS = tuple(
    Configuration(each.label + suffix, {**each.model, **extra}, RECIPE)
    for each in (LAYERNORM_GELU, GELU)
    for suffix, extra in (("", {}), ("+QK", {"qk_norm": "layernorm"}))
)


def largest_by(logits: pd.DataFrame, *columns: str) -> pd.Series:
    """The largest logit of each group; NaN for a group with a NaN."""
    return logits.groupby(list(columns), sort=False)[QK_LOGIT_MAX].agg(lambda values: values.max(skipna=False))


@paper_style()
def attention_logits(logits: pd.DataFrame) -> Figure:
    """The largest attention logit of each layer over training, a panel each configuration; the largest of all seeds.

    Args:
        logits: the columns of a run, step, layer, qk_logit_max: the largest of the layer's heads.
    """
    configurations = in_order(logits["configuration"])
    layers = sorted(in_order(logits["layer"]))
    figure, grid = panel_grid(len(configurations), len(configurations), row_height=1.9, sharex=True, sharey=True)
    for axes, configuration in zip(grid.flat, configurations, strict=True):
        of_seeds = logits[logits["configuration"] == configuration]
        largest = largest_by(of_seeds, "step", "layer").reset_index().assign(seed=0)
        layer_curves(axes, largest, QK_LOGIT_MAX, layers)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter("{x:,.12g}")
        title_panel(axes, configuration)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("training step", fontsize=7)
    grid[0, 0].set_ylabel("largest attention logit")
    depth_bar(figure, grid, layers, "layer")
    return figure


def describe(page: StudyPage) -> Findings:
    """Logits over training, and the largest of each run."""
    heads = telemetry_frame(page.results, [QK_LOGIT_MAX], ("step", "layer", "head"))
    logits = largest_by(heads, *KEY, "step", "layer").reset_index()
    run = ("configuration", "seed")
    last = logits[logits["step"] == logits.groupby(list(run))["step"].transform("max")]
    largest = {"Largest": largest_by(logits, *run), "At the last reading": largest_by(last, *run)}
    table = pd.DataFrame({title: values.map(_number) for title, values in largest.items()}).reset_index()
    figure = page.figure(
        "attention-logits",
        attention_logits(logits),
        "The largest attention logit of each layer (heads and seeds taken together) on training batches. The axis is "
        "linear between −1 and 1, logarithmic beyond.",
    )
    caption = "The largest attention logit of each run: over all readings of telemetry, and at the last one."
    shown = Table(table.rename(columns={"configuration": "Configuration", "seed": "Seed"}), caption)
    return Findings(_lead(largest_by(logits, "configuration")), [Section("Attention logits", [figure, shown])], _LIMITS)


_LIMITS = (
    "Logits grow with width, learning rate and training length: small models after short trainings seldom reach those "
    "at which large ones become unstable."
)


def _number(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else str(value)


def _lead(largest: pd.Series) -> str:
    """The largest logit of each configuration, and what QK normalization does to it."""
    shown = ", ".join(f"{label} {_number(value)}" for label, value in largest.items())
    sentences = [f"Largest attention logit: {shown}."]
    for label in (LAYERNORM_GELU.label, GELU.label):
        without, normalized = largest.reindex([label, f"{label}+QK"])
        if np.isfinite([without, normalized]).all():
            sentences.append(
                f"QK normalization {'lowers' if normalized < without else 'does not lower'} it in {label}."
            )
    return " ".join(sentences)


STUDY = Study(
    name="attention-logits",
    title="Attention logits, with and without normalized queries and keys",
    question="Do attention logits grow without LayerNorm, and does QK normalization hold them?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: CONFIGURATIONS,
    describe=describe,
    papers=(Link("Scaling Vision Transformers to 22 Billion Parameters, 2023", "https://arxiv.org/abs/2302.05442"),),
)
