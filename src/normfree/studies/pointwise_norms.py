"""Point-wise functions in place of norms: Dynamic Tanh ("Transformers without Normalization", 2025) and Dynamic erf
("Stronger Normalization-Free Transformers", 2025), next to LayerNorm, RMSNorm and no norm.

Both papers read the learned α as a substitute for the statistics of a norm: where activations are large, α is small.
Both replace the final norm too. In a small model the residual stream outgrows a final tanh or erf in the first steps:
it saturates, passes hardly any gradient, and the model learns late or never. So each is trained with a final LayerNorm
as well.
"""

from __future__ import annotations

import re

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from normfree.columns import ENTROPY_NATS, RESIDUAL_RMS
from normfree.data import PackedData
from normfree.report import Callout, Link, Section
from normfree.report.frames import in_order
from normfree.report.primitives import (
    configuration_curves,
    explain_empty,
    integer_axis,
    legend_above,
    logarithmic_axis,
    panel_grid,
    seeds_note,
)
from normfree.report.style import ONE_COLUMN, QUIET, configuration_colours, paper_style
from normfree.runner import (
    COMPARABLE,
    Configuration,
    Findings,
    Measurement,
    Study,
    StudyPage,
    final_checkpoint,
    head_entropy_frame,
    measured_frame,
    telemetry_frame,
)
from normfree.studies.curse_of_depth import DYNAMIC_ERF, DYNAMIC_TANH
from normfree.training import RunResult, load_pretrained
from normfree.training.records import write_parquet

LAYERNORM = Configuration("LayerNorm", {"norm": "layernorm", "final_norm": "layernorm"})
_EVERYWHERE = (Configuration("Dynamic Tanh", DYNAMIC_TANH), Configuration("Dynamic erf", DYNAMIC_ERF))
POINTWISE = tuple(
    configuration
    for each in _EVERYWHERE
    for configuration in (
        each,
        Configuration(f"{each.label}, final LayerNorm", {**each.model, "final_norm": "layernorm"}),
    )
)
"""In place of every norm, as in both papers, and of the blocks' norms alone."""
CONFIGURATIONS = (
    LAYERNORM,
    Configuration("RMSNorm", {"norm": "rmsnorm", "final_norm": "rmsnorm"}),
    *POINTWISE,
    Configuration("No norm", {"norm": "none", "final_norm": "layernorm"}),
)
ALPHA_FILE = "alpha.parquet"
_ALPHA = re.compile(r"blocks\.(\d+)\.(\w+)\.alpha")


def measure(result: RunResult, data: PackedData, console: Console) -> None:
    """Writes ``alpha.parquet`` into the folder of a run with a point-wise function: layer, place, alpha.

    α of the final weights, for each norm in the blocks (``place`` is its module's name); a run that diverged has none.
    """
    path, checkpoint = result.folder / ALPHA_FILE, final_checkpoint(result)
    if result.row["configuration"] not in {each.label for each in POINTWISE} or path.exists() or checkpoint is None:
        return
    model = load_pretrained(str(checkpoint)).as_normfree()
    found = [(_ALPHA.search(name), value.item()) for name, value in model.named_parameters() if name.endswith(".alpha")]
    rows = [{"layer": int(at[1]), "place": at[2], "alpha": value} for at, value in found if at is not None]
    write_parquet(pd.DataFrame(rows), path)


@paper_style()
def entropy_and_alpha(heads: pd.DataFrame, alphas: pd.DataFrame, *, bound: float) -> Figure:
    """Attention entropy by layer with each norm, and the α that point-wise functions learned; means over seeds.

    Args:
        heads: configuration, seed, layer, head, entropy_nats.
        alphas: configuration, seed, layer, place, alpha; may be empty.
        bound: entropy of uniform attention, in nats.
    """
    colours = configuration_colours(in_order(heads["configuration"]))
    places = in_order(alphas["place"])
    figure, grid = panel_grid(1 + max(len(places), 1), 1 + max(len(places), 1), row_height=2.3)
    left, *others = grid.flat
    entropy = heads.groupby(["configuration", "layer"], sort=False)[ENTROPY_NATS]
    # A mean with a head that is NaN is NaN: it leaves a gap.
    means = entropy.agg(lambda values: values.mean(skipna=False)).reset_index().assign(seed=0)
    configuration_curves(left, means, ENTROPY_NATS, over="layer", colours=colours)
    left.axhline(bound, color=QUIET, linestyle=":", label="uniform attention")
    left.set(ylabel="attention entropy (nats)", ylim=(0, 1.08 * bound), title="Attention")
    for axes, place in zip(others, places, strict=False):
        of_place = alphas[alphas["place"] == place].groupby(["configuration", "layer"], as_index=False)["alpha"].mean()
        configuration_curves(axes, of_place.assign(seed=0), "alpha", over="layer", colours=colours)
        axes.set(ylabel="learned α", title=f"α of the {str(place).replace('_', ' ').replace('ffn', 'FFN')}")
    for axes in grid.flat:
        integer_axis(axes, most=7)
    if not places:
        explain_empty(others[0], "no run with a point-wise function has been measured")
    figure.supxlabel("layer", fontsize=7)
    legend_above(figure, left)
    return figure


@paper_style()
def residual_growth(rms: pd.DataFrame) -> Figure:
    """RMS of the residual stream after the last block over training, a line a configuration.

    Args:
        rms: configuration, seed, step, layer, residual_rms.
    """
    figure = Figure(figsize=(1.5 * ONE_COLUMN, 2.3), layout="constrained")
    axes = figure.subplots()
    configuration_curves(axes, rms[rms["layer"] == rms["layer"].max()], RESIDUAL_RMS, over="step")
    logarithmic_axis(axes)
    axes.set(xlabel="training step" + seeds_note(rms, band=True), ylabel="residual RMS after the last block")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def describe(page: StudyPage) -> Findings:
    """Entropy by layer, learned α, which the papers call a substitute for statistics, and the residual stream."""
    measured = [each for each in page.results if (each.folder / ALPHA_FILE).exists()]
    columns = ["configuration", "seed", "layer", "place", "alpha"]
    alphas = measured_frame(measured, ALPHA_FILE) if measured else pd.DataFrame(columns=columns)
    figure = page.figure(
        "entropy-and-alpha",
        entropy_and_alpha(head_entropy_frame(page.results), alphas, bound=page.uniform_bound),
        "Left: attention entropy by layer, mean over heads and seeds: final weights, evaluation tokens. Right: α of "
        "the point-wise functions after training, mean over seeds.",
    )
    expected = sum(each.row["configuration"] in {each.label for each in POINTWISE} for each in page.results)
    missing = expected - len(measured)
    note = Callout(f"Runs without α, because they diverged or are not measured yet: {missing}.", "warning")
    growth = page.figure(
        "residual-growth",
        residual_growth(telemetry_frame(page.results, [RESIDUAL_RMS])),
        "RMS of the residual stream after the last block, on training batches. A final tanh or erf that reads a much "
        "larger RMS than 1 / α saturates.",
    )
    sections = [
        Section("Attention entropy and α", [figure, *([note] if missing else [])]),
        Section("Residual stream", [growth]),
    ]
    return Findings(_lead(page.table, alphas), sections, f"{COMPARABLE} {_LIMITS}")


_LIMITS = (
    "Initial α is that of the papers and was not tuned; both papers train at learning rates of their own, and here all "
    "norms share one. With --tune-lr each gets its own."
)


def _lead(table: pd.DataFrame, alphas: pd.DataFrame) -> str:
    """Loss against LayerNorm, and α of the first and the last layer."""
    against = table.set_index("configuration")["loss_difference"].drop(LAYERNORM.label)
    listed = [f"{label} {gap:+.3f}" if gap == gap else f"{label} diverged" for label, gap in against.items()]
    sentences = [f"Evaluation loss minus that of {LAYERNORM.label}, nats: {', '.join(listed)}."] if listed else []
    for name, of_label in alphas.groupby("configuration", sort=False):
        by_layer = of_label.groupby("layer")["alpha"].mean()
        first, last = by_layer.iloc[0], by_layer.iloc[-1]
        sentences.append(f"Mean α of {name} is {first:.2f} in the first layer and {last:.2f} in the last.")
    return " ".join(sentences) or "Only the baseline has been trained yet."


STUDY = Study(
    name="pointwise-norms",
    title="Point-wise functions in place of norms",
    question="Do point-wise functions replace norms: loss, attention entropy, learned scales?",
    baseline=LAYERNORM.label,
    configurations=lambda preset: CONFIGURATIONS,
    describe=describe,
    measurement=lambda preset: Measurement(lambda: None, measure),
    papers=(
        Link("Transformers without Normalization, 2025", "https://arxiv.org/abs/2503.10622"),
        Link("Stronger Normalization-Free Transformers, 2025", "https://arxiv.org/abs/2512.10938"),
    ),
)
