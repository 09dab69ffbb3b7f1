"""Loss by training length: where norms and activations change places as data stop being scarce.

Each length is a training of its own, with its own warm-up and decay: an evaluation halfway through a longer one would
compare models whose learning rate is still high. "Dynamic Tanh helps where data are scarce, and hurts where they are
not" (arXiv 2604.23434); here the same is asked of models without norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError
from normfree.report import FIGURES_FOLDER, Link, Section, Table, paper_style, saved_figure
from normfree.report.frames import check_frame, in_order
from normfree.report.intervals import mean_confidence_interval
from normfree.report.numbers import number, plus_minus
from normfree.report.primitives import configuration_curves
from normfree.report.style import ONE_COLUMN, QUIET, configuration_colours
from normfree.runner import Collection, Configuration, Findings, Member, Preset, Study, StudyPage, load_preset
from normfree.studies.curse_of_depth import DYNAMIC_ERF, DYNAMIC_TANH
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, LAYERNORM_RELU, PAPER, RELU, scale_limits

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the preset's optimizer steps."""
BASELINE = LAYERNORM_GELU.label
CONFIGURATIONS = (
    *(LAYERNORM_GELU, LAYERNORM_RELU, GELU, RELU),
    Configuration("SM+DyT+G", {"activation": "gelu", **DYNAMIC_TANH, "final_norm": "layernorm"}),
    Configuration("SM+Derf+G", {"activation": "gelu", **DYNAMIC_ERF, "final_norm": "layernorm"}),
)
"""All keep the final LayerNorm, as the paper's norm-free models do: a final tanh or erf saturates in the first steps
(see the study ``pointwise-norms``)."""
COLUMNS = ("tokens", "configuration", "seed", EVAL_LOSS)
_SHORT = EngFormatter(places=1, sep="")
"""Of numbers of tokens: ``2.1M``."""
_CAPTION = (
    f"Evaluation loss less that of {BASELINE} of the same seed and length, by training tokens; line: mean over seeds, "
    "band: their range. Each point is the end of a training of its own."
)


def excess_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Loss less the baseline's of the same seed and length; rows without such a baseline are left out.

    Args:
        runs: columns tokens, configuration, seed, eval_loss (nats per token; NaN: diverged).

    Returns:
        The same rows in the same order, without those of the baseline, with a column excess_nats.

    Raises:
        InputError: a column is missing, or a run occurs twice.
    """
    check_frame(runs, "runs", COLUMNS, (EVAL_LOSS,))
    is_baseline = runs["configuration"] == BASELINE
    baseline = runs[is_baseline].rename(columns={EVAL_LOSS: "baseline"})[["tokens", "seed", "baseline"]]
    joined = runs[~is_baseline].merge(baseline, on=["tokens", "seed"], how="inner")
    return joined.assign(excess_nats=joined[EVAL_LOSS] - joined["baseline"]).drop(columns="baseline")


def crossings(excess: pd.DataFrame) -> dict[str, list[tuple[int, int]]]:
    """Between which lengths the mean excess of a configuration changes its sign, in training tokens; none is left out.

    A length at which a run diverged is passed over.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for name, rows in excess.groupby("configuration", sort=False):
        means = rows.groupby("tokens")["excess_nats"].agg(lambda each: each.mean(skipna=False)).dropna()
        signs = np.sign(means.to_numpy(dtype=np.float64))
        places = [i for i in range(len(signs) - 1) if signs[i] * signs[i + 1] < 0]
        if places:
            found[str(name)] = [(int(means.index[i]), int(means.index[i + 1])) for i in places]
    return found


@paper_style()
def excess_by_length(excess: pd.DataFrame) -> Figure:
    """Excess of the loss over training tokens, a line a configuration.

    Args:
        excess: see :func:`excess_losses`.
    """
    figure = Figure(figsize=(1.5 * ONE_COLUMN, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = configuration_colours([BASELINE, *in_order(excess["configuration"])])
    del colours[BASELINE]
    configuration_curves(axes, excess, "excess_nats", over="tokens", broken_word="diverged", colours=colours)
    for name, runs in excess.groupby("configuration", sort=False):
        axes.scatter(runs["tokens"], runs["excess_nats"], s=7, color=colours[str(name)], linewidths=0, zorder=3)
    axes.axhline(0, color=QUIET, linestyle=":", label=BASELINE)
    axes.set_xscale("log", base=2)
    lengths = sorted(in_order(excess["tokens"]))
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_SHORT)
    axes.set(xlabel="training tokens", ylabel=f"loss less that of {BASELINE} (nats)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def formatted_excess(runs: pd.DataFrame) -> pd.DataFrame:
    """For readers: a row a configuration, a column a length; losses of the baseline, excesses of the others."""
    lengths = sorted(in_order(runs["tokens"]))
    excess = excess_losses(runs)
    rows = []
    for name in in_order(runs["configuration"]):
        frame, column = (runs, EVAL_LOSS) if name == BASELINE else (excess, "excess_nats")
        cells = {"Configuration": name if name == BASELINE else f"{name} \N{MINUS SIGN} {BASELINE}"}
        for tokens in lengths:
            values = frame[(frame["configuration"] == name) & (frame["tokens"] == tokens)][column]
            form = ".3f" if name == BASELINE else "+.3f"
            estimate = mean_confidence_interval(values.to_numpy(np.float64)) if len(values) else None
            cells[_SHORT(tokens)] = "" if estimate is None else plus_minus(estimate, form)
        rows.append(cells)
    return pd.DataFrame(rows)


def _runs(pages: Sequence[StudyPage]) -> pd.DataFrame:
    runs = pd.concat([page.recipe_runs[[*COLUMNS]] for page in pages])
    return runs.sort_values("tokens", kind="stable", ignore_index=True)


def _lead(excess: pd.DataFrame) -> str:
    """The excesses at both ends, and where they change their sign."""
    if excess.empty:
        return "Only the baseline has been trained yet."
    means = excess.groupby(["configuration", "tokens"], sort=False)["excess_nats"].agg(
        lambda each: each.mean(skipna=False)
    )
    sentences = []
    for name in in_order(excess["configuration"]):
        own = means[name].sort_index()
        told = ", ".join(number(value, "+.3f") for value in own)
        sentences.append(f"{name}: {told}")
    lengths = ", ".join(_SHORT(tokens) for tokens in sorted(in_order(excess["tokens"])))
    crossed = [
        f"{name} changes places with {BASELINE} between {_SHORT(low)} and {_SHORT(high)} tokens"
        for name, places in crossings(excess).items()
        for low, high in places
    ]
    return (
        f"Loss less that of {BASELINE}, nats, after {lengths} tokens: {'; '.join(sentences)}. "
        + ("; ".join(crossed) if crossed else f"None changes places with {BASELINE}")
        + "."
    )


def _describe_member(page: StudyPage) -> Findings:
    excess = excess_losses(_runs([page]))
    return Findings(_lead(excess), [Section("Loss", [page.loss_figure()])], scale_limits(page).strip())


MEMBER: Study = Study(
    name="training-length-runs",
    title="Norms and activations at one training length",
    question="Which norm and activation is best at this training length?",
    baseline=BASELINE,
    configurations=lambda preset: CONFIGURATIONS,
    describe=_describe_member,
    papers=(PAPER,),
)


def _members(preset_name: str, changed: Callable[[Preset], Preset]) -> list[Member]:
    """The preset at each share of its steps; the tokenized corpus is the same for all."""
    preset, stem = changed(load_preset(preset_name)), Path(preset_name).stem
    steps = preset.recipe.n_steps(preset.data.sequence_length)
    counts = [round(share * steps) for share in SHARES]
    if len(set(counts)) < len(counts) or counts[0] < 1:
        raise InputError(f"training-length takes sixteenths of the steps, and the preset has {steps}; give more")
    members = []
    for n_step in counts:
        changes = {"recipe.tokens": None, "recipe.steps": n_step, "published": None}
        members.append(Member(f"steps-{n_step}", MEMBER, stem, preset.with_changes(**changes)))
    return members


def _describe(pages: Sequence[StudyPage], _: pd.DataFrame, path: Path) -> Findings:
    runs = _runs(pages)
    excess = excess_losses(runs)
    figure = saved_figure(path / FIGURES_FOLDER, "excess-by-length", excess_by_length(excess), _CAPTION)
    table = Table(formatted_excess(runs), "Loss and excess in nats per token, ± 95 % t-interval over seeds.")
    return Findings(
        _lead(excess), [Section("Loss by training length", [figure, table])], scale_limits(pages[-1]).strip()
    )


TRAINING_LENGTH: Collection = Collection(
    "training-length",
    "Norms and activations by training length",
    _members,
    lambda pages: pd.concat([page.table for page in pages], ignore_index=True),
    _describe,
    question="At which training length do norms and activations change places?",
    presets=("smoke", "cpu", "cpu-long", "gpu"),
    papers=(
        PAPER,
        Link("Transformers without Normalization, 2025", "https://arxiv.org/abs/2503.10622"),
        Link("Stronger Normalization-Free Transformers, 2025", "https://arxiv.org/abs/2512.10938"),
        Link("arXiv 2604.23434", "https://arxiv.org/abs/2604.23434"),
    ),
)
STUDIES = (MEMBER, TRAINING_LENGTH)
