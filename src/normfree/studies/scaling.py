"""Where ReLU beats GELU without LayerNorm: other widths, depths, context lengths and learning rates.

The paper trains every model at one learning rate. Here each size is trained at several, so that its claim can be read
at each of them, and with each activation at its own best one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.report import FIGURES_FOLDER, Section, Table, paper_style, saved_figure
from normfree.report.frames import check_columns, in_order
from normfree.report.numbers import number
from normfree.report.primitives import annotated_heatmap, colour_bar
from normfree.report.style import TWO_COLUMN, difference_colours
from normfree.runner import Collection, Configuration, Findings, Member, Preset, Study, StudyPage, load_preset
from normfree.studies.relu_revival import GELU, PAPER, RELU, scale_limits

LEARNING_RATE_FACTORS = (0.5, 1.0, 2.0)
SIZE_FACTORS = (0.5, 2.0)
BASE = "base"
OWN_BEST = "own best"
"""The row of a gap table in which each activation has its own best learning rate."""
GAP_COLUMNS = ("size", "activation", "learning_rate", "seed", EVAL_LOSS)


def _sizes(preset: Preset) -> dict[str, dict[str, int]]:
    """The preset's own size, then half and twice its width (with heads of the same width) and its depth."""
    n_layer = preset.n_layer
    n_embd, n_head = (int(preset.model.get(name, getattr(NormfreeConfig, name))) for name in ("n_embd", "n_head"))
    if n_head % 2 or n_embd % (2 * n_head) or n_layer % 2:
        raise InputError(
            f"the scaling study halves n_layer ({n_layer}), n_head ({n_head}) and n_embd ({n_embd}) of its preset; "
            "use even numbers, and n_embd divisible by 2 n_head"
        )
    sizes: dict[str, dict[str, int]] = {BASE: {}}
    for factor in SIZE_FACTORS:
        width = int(factor * n_embd)
        sizes[f"width {width}"] = {"n_embd": width, "n_head": int(factor * n_head)}
    for factor in SIZE_FACTORS:
        depth = int(factor * n_layer)
        sizes[f"depth {depth}"] = {"n_layer": depth}
    return sizes


def _grid(preset: Preset, sizes: dict[str, dict[str, int]]) -> Iterator[tuple[dict[str, Any], Configuration]]:
    """What each run is (size, activation, learning_rate) and its configuration; the plain one has the plain label."""
    for size, changes in sizes.items():
        for factor in LEARNING_RATE_FACTORS:
            rate = factor * preset.recipe.learning_rate
            for activation in (GELU, RELU):
                plain = size == BASE and factor == 1.0
                label = activation.label if plain else f"{activation.label}, {size}, {rate:g}"
                what = {"size": size, "activation": activation.label, "learning_rate": rate}
                yield what, Configuration(label, {**activation.model, **changes}, {"learning_rate": rate})


def _losses(page: StudyPage, base_name: str) -> pd.DataFrame:
    """Columns size, activation, learning_rate, seed, eval_loss: finished runs, the base size under ``base_name``."""
    sizes = _sizes(page.folder.preset) if page.folder.study_name == SIZES.name else {BASE: {}}
    what = {configuration.label: known for known, configuration in _grid(page.folder.preset, sizes)}
    runs = page.recipe_runs
    places = pd.DataFrame([what[name] for name in runs["configuration"]])
    return places.join(runs[["seed", EVAL_LOSS]]).replace({"size": {BASE: base_name}})


def _describe_member(page: StudyPage) -> Findings:
    gap = loss_gap(_losses(page, BASE), GELU.label, RELU.label)
    figure = page.figure("loss-gap", _heatmap(gap), _CAPTION)
    return Findings(_lead(gap), [Section("GELU against ReLU", [figure])], scale_limits(page).strip())


_CAPTION = (
    "By how many percent SM+G's perplexity is higher than SM+R's, by size and learning rate, mean over seeds; colours "
    "are the difference of losses in nats. Last row: each activation at its own best rate. Hatched: a run diverged or "
    "is missing."
)
SIZES: Study = Study(
    name="scaling-sizes",
    title="ReLU against GELU without LayerNorm: width, depth and learning rate",
    question="At which widths, depths and learning rates does ReLU beat GELU?",
    baseline=GELU.label,
    configurations=lambda preset: tuple(each for _, each in _grid(preset, _sizes(preset))),
    describe=_describe_member,
    papers=(PAPER,),
)
CONTEXT: Study = Study(
    name="scaling-context",
    title="ReLU against GELU without LayerNorm: twice the context length",
    question="Does ReLU beat GELU at twice the context length?",
    baseline=GELU.label,
    configurations=lambda preset: tuple(each for _, each in _grid(preset, {BASE: {}})),
    describe=_describe_member,
    papers=(PAPER,),
)


def _members(preset_name: str, changed: Callable[[Preset], Preset]) -> list[Member]:
    """Every size at the preset's context length, and its own size at twice that, with as many tokens in a step."""
    preset, stem = changed(load_preset(preset_name)), Path(preset_name).stem
    length, recipe = preset.data.sequence_length, preset.recipe
    batch, micro = recipe.batch_size, recipe.micro_batch_size
    if batch % 2 or micro % 2:
        raise InputError(
            f"the scaling study halves batch_size ({batch}) and micro_batch_size ({micro}) at twice the context "
            "length; use even numbers"
        )
    halved = {"recipe.batch_size": batch // 2, "recipe.micro_batch_size": micro // 2}
    longer = preset.with_changes(**halved, **{"data.sequence_length": 2 * length, "published": None})
    return [
        Member(f"context-{length}", SIZES, stem, preset),
        Member(f"context-{2 * length}", CONTEXT, stem, longer),
    ]


def _gap(pages: Sequence[StudyPage]) -> pd.DataFrame:
    frames = [_losses(page, f"{BASE}, T = {page.folder.preset.data.sequence_length}") for page in pages]
    return loss_gap(pd.concat(frames, ignore_index=True), GELU.label, RELU.label)


def _heatmap(gap: pd.DataFrame) -> Figure:
    return loss_gap_heatmap(gap, first=GELU.label, second=RELU.label)


def _describe(pages: Sequence[StudyPage], _: pd.DataFrame, path: Path) -> Findings:
    """The map of where the claim holds."""
    gap = _gap(pages)
    figure = saved_figure(path / FIGURES_FOLDER, "loss-gap", _heatmap(gap), _CAPTION)
    formats = dict.fromkeys(map(str, gap.columns), "+.3f")
    shown = gap.reset_index(names="Learning rate")
    table = Table(shown, "Loss of SM+G less that of SM+R, nats per token.", formats=formats)
    return Findings(_lead(gap), [Section("Where ReLU beats GELU", [figure, table])], scale_limits(pages[0]).strip())


def _lead(gap: pd.DataFrame) -> str:
    """In how many cells ReLU is better."""
    at_rates, own_best = gap.drop(index=OWN_BEST).to_numpy(), gap.loc[[OWN_BEST]].to_numpy()
    if not np.isfinite(at_rates).any():
        return "Nowhere have GELU and ReLU both been trained to the end at one size and learning rate."
    return (
        f"Without LayerNorm, ReLU has the lower loss in {(at_rates > 0).sum()} of {np.isfinite(at_rates).sum()} pairs "
        f"of runs at one size and learning rate (a run diverged or is missing in {np.isnan(at_rates).sum()}), and with "
        f"each activation at its own best rate at {(own_best > 0).sum()} of {np.isfinite(own_best).sum()} sizes."
    )


def loss_gap(results: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Loss of ``first`` less loss of ``second`` in nats per token, by learning rate (rows) and size (columns).

    Mean over seeds. The last row, ``own best``, takes each activation at the learning rate where its
    mean loss over seeds is lowest; a rate at which any seed diverged is no candidate. 100 (exp(gap) − 1) is by how many
    percent the perplexity of ``first`` is higher.

    Args:
        results: columns size, activation, learning_rate, seed, eval_loss (NaN: diverged).
        first: the activation whose excess is shown.
        second: the activation it is compared with.

    Returns:
        Rows: learning rates in rising order as text, then ``own best``; columns: sizes in order of appearance. NaN
        where a run diverged or is missing.

    Raises:
        InputError: a column is missing, or a run occurs twice.
    """
    check_columns(results, "results", GAP_COLUMNS)
    if results.duplicated(list(GAP_COLUMNS[:-1])).any():
        raise InputError("the results frame has a run twice; give one row for each size, activation, rate and seed")
    of_seeds = results.groupby(["activation", "size", "learning_rate"])[EVAL_LOSS]
    losses: Any = of_seeds.agg(lambda each: each.mean(skipna=False))
    sizes, rates = in_order(results["size"]), sorted(in_order(results["learning_rate"]))
    cells = pd.MultiIndex.from_product([sizes, rates])
    of_first, of_second = (losses[each].reindex(cells).unstack().loc[sizes].T for each in (first, second))
    gap = of_first - of_second
    gap.index = pd.Index([f"{rate:g}" for rate in rates])
    gap.loc[OWN_BEST] = of_first.min() - of_second.min()
    return gap


@paper_style()
def loss_gap_heatmap(gap: pd.DataFrame, *, first: str, second: str) -> Figure:
    """The gaps of :func:`loss_gap` on a scale centred at zero, written as percent of perplexity.

    Red: ``first`` is worse; blue: ``second`` is. Hatched: a run diverged or is missing.
    """
    values = gap.to_numpy(dtype=np.float64)
    norm, colours = CenteredNorm(0, max(np.abs(values[np.isfinite(values)]), default=0.0) or 1.0), difference_colours()
    size = (min(TWO_COLUMN, 1.9 + 0.62 * values.shape[1]), 1.0 + max(0.3 * len(gap), 0.9))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    rows, columns = map(str, gap.index), map(str, gap.columns)
    annotated_heatmap(axes, values, norm, colours, rows=list(rows), columns=list(columns), text=_percent)
    axes.axhline(len(gap) - 1.5, color="white", linewidth=2.5)
    axes.set_xticks(range(values.shape[1]), gap.columns, rotation=25, ha="right", rotation_mode="anchor")
    axes.set_ylabel("learning rate")
    colour_bar(figure, axes, norm, colours, f"loss of {first} less that of {second} (nats per token)")
    return figure


def _percent(gap: float) -> str:
    return f"{number(100 * np.expm1(gap), '+.0f')} %" if np.isfinite(gap) else "\N{EN DASH}"


SCALING: Collection = Collection(
    "scaling",
    "Where ReLU beats GELU without LayerNorm",
    _members,
    lambda pages: pd.concat([page.table for page in pages], ignore_index=True),
    _describe,
    question="At which widths, depths, context lengths and learning rates does ReLU beat GELU?",
    papers=(PAPER,),
)
STUDIES = (SIZES, CONTEXT, SCALING)
