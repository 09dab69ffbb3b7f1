"""Fixed negative slopes without LayerNorm (ReLU's Revival, Section 3, Figure 5): NaNs and entropy collapse."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from normfree.columns import ENTROPY_NATS
from normfree.report import Callout, Section, Table
from normfree.report.frames import NONFINITE_COUNTS
from normfree.runner import Configuration, Findings, Study, StudyPage, layer_entropy_frame, telemetry_frame
from normfree.studies.negative_slope.events import entropy_collapse, first_nonfinite
from normfree.studies.negative_slope.figures import instability_dynamics
from normfree.studies.relu_revival import PAPER, RELU, scale_limits
from normfree.training import Recipe

SLOPES = (0.01, 0.05, 0.1, 0.2)
COLLAPSE_SHARES = (0.1, 0.25)
"""Entropy has collapsed below this share of uniform attention's: the strict one first, then a lenient one."""
NEVER = "\N{EN DASH}"

LEAKY = tuple(
    Configuration(f"SM+L {slope:g}", {"norm": "none", "activation": "leaky_relu", "negative_slope": slope})
    for slope in SLOPES
)


def describe(page: StudyPage) -> Findings:
    """The paper's Figure 5 from the study's runs, and the steps at which each of them became unstable."""
    counts = telemetry_frame(page.results, NONFINITE_COUNTS).astype(dict.fromkeys(NONFINITE_COUNTS, "int64"))
    entropy = layer_entropy_frame(page.results)
    runs = _runs(page, counts, entropy)
    section = Section(
        "Instability",
        [
            page.figure(
                "instability",
                instability_dynamics(counts, entropy, bound=page.uniform_bound),
                "NaN and infinite values by layer and step, and layer-wise attention entropy (compare Figure 5 of the "
                "paper): counts over the attention scores and the residual stream after each block, entropy as the "
                "mean over heads, both on training batches. White: no such value. Hatched: a layer's entropy is NaN.",
            ),
            _table(page, runs),
            Callout(what_nan_means(page.folder.preset.recipe)),
            page.loss_figure(),
        ],
    )
    return Findings(_lead(runs), [section], scale_limits(page) + _LIMITS)


_LIMITS = (
    "A short training in large steps can become unstable at once or never; the order of the slopes says more than the "
    "steps themselves."
)


def what_nan_means(recipe: Recipe) -> str:
    """Where a NaN comes from in runs of this precision and attention, in words for the reader."""
    if recipe.precision != "fp16":
        return (
            f"These runs are in {recipe.precision}, whose range ends at 3.4e38. A NaN here is a training that "
            "diverged, not the overflow beyond 65,504 that fp16 adds and that the paper's runs are open to; for that, "
            "train with --set recipe.precision=fp16 --set recipe.attn_implementation=eager."
        )
    overflow = (
        "These runs are in fp16: a value beyond 65,504 becomes infinite, and soon NaN, though the weights are finite. "
        "The update of such a step is skipped and the loss scale halved."
    )
    if recipe.attn_implementation == "eager":
        return f"{overflow} Attention is eager: its scores are fp16 numbers and overflow like all others."
    return (
        f"{overflow} Attention is fused ({recipe.attn_implementation}) and keeps its scores in fp32, where they do not "
        "overflow: infinite scores are counted as eager attention would have had them, and the model never saw them. "
        "For the paper's overflow, train with --set recipe.attn_implementation=eager."
    )


def _runs(page: StudyPage, counts: pd.DataFrame, entropy: pd.DataFrame) -> pd.DataFrame:
    """One row a run: configuration, seed, status; step, layer, place, nan_count and inf_count of the first NaN or Inf;
    for each share, ``collapse_SHARE`` (Int64) and ``layers_SHARE``; nan_readings and readings of entropy.
    """
    run = ["configuration", "seed"]
    # In the study's order: a configuration's seeds stand together in the table.
    runs = pd.DataFrame([{name: each.row[name] for name in (*run, "status")} for each in page.results])
    runs = runs.merge(first_nonfinite(counts).drop(columns=["model", "context_length"]), on=run)
    for share in COLLAPSE_SHARES:
        layers = entropy_collapse(entropy, page.uniform_bound, share=share)
        collapsed = layers[layers["step"].notna()].groupby(run)
        by_run = pd.DataFrame(
            {f"collapse_{share:g}": collapsed["step"].min(), f"layers_{share:g}": collapsed["layer"].agg(sorted)}
        )
        runs = runs.merge(by_run, on=run, how="left")
    readings = entropy.groupby(run)[ENTROPY_NATS].agg(nan_readings=lambda values: values.isna().sum(), readings="size")
    return runs.merge(readings, on=run)


def _table(page: StudyPage, runs: pd.DataFrame) -> Table:
    rows = []
    for run in runs.to_dict("records"):
        row = {"Configuration": run["configuration"], "Seed": run["seed"]}
        row["First NaN or Inf, step"] = NEVER if pd.isna(run["step"]) else f"{run['step']}"
        row["Where"] = NEVER if pd.isna(run["step"]) else _where(run)
        for share in COLLAPSE_SHARES:
            step = run[f"collapse_{share:g}"]
            row[f"Collapse below {100 * share:.0f} %, step"] = (
                NEVER if pd.isna(step) else f"{step} ({_layers(run[f'layers_{share:g}'])})"
            )
        row["NaN entropies"] = f"{run['nan_readings']} of {run['readings']}"
        row["Status"] = run["status"]
        rows.append(row)
    recipe = page.folder.preset.recipe
    return Table(
        pd.DataFrame(rows),
        "When each run became unstable. –: not in this run.",
        notes=[
            f"Telemetry is read every {recipe.telemetry_steps} steps; a step s is the weights after s updates.",
            "Where: the earliest place of the forward pass at that step; everything behind it inherits the NaN.",
            "Collapse: the step from which the mean entropy of a layer's heads stays below that share of uniform "
            f"attention's ({page.uniform_bound:.3f} nats), and in brackets all layers it happened to by the end. "
            "No threshold is given in the literature: two show how much it matters.",
            "NaN entropies: readings (steps times layers) with a NaN head. They are not collapse. Under eager "
            "attention the entropy is that of the weights it made, NaN where its scores overflowed; under sdpa it is "
            "computed in float32 from queries and keys, and scores that overflow only in fp16 leave it finite.",
        ],
    )


def _where(run: Mapping[Hashable, Any]) -> str:
    kinds = [f"{run[f'{kind.lower()}_count']:,} {kind}" for kind in ("NaN", "Inf") if run[f"{kind.lower()}_count"] > 0]
    return f"{run['place']} of layer {run['layer']} ({', '.join(kinds)})"


def _layers(layers: Sequence[int]) -> str:
    """Sorted layers as text, such as ``layers 0, 8–11``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    shown = ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
    return f"layer{'s' if len(layers) > 1 else ''} {shown}"


def _lead(runs: pd.DataFrame) -> str:
    """Both events at each slope, and whether they come in the paper's order, in words that hold for any numbers."""
    events = {
        "First NaN or Inf": "step",
        f"Entropy collapse (below {100 * COLLAPSE_SHARES[0]:.0f} % of uniform)": f"collapse_{COLLAPSE_SHARES[0]:g}",
    }
    sentences = []
    for event, column in events.items():
        shown = []
        for label, of_label in runs.groupby("configuration", sort=False):
            of_seeds = ("never" if pd.isna(step) else f"step {step}" for step in of_label[column].tolist())
            shown.append(f"{label} {' / '.join(of_seeds)}")
        sentences.append(f"{event}: {', '.join(shown)}. {_order(runs, column)}")
    return " ".join(sentences)


def _order(runs: pd.DataFrame, column: str) -> str:
    """Whether the steps in ``column`` are the paper's "the larger the negative slope, the earlier", seed by seed.

    Only seeds with a run at every slope are compared, and a run without the event counts as later than any.
    """
    steps = runs.pivot(index="seed", columns="configuration", values=column).astype("Float64")
    trained = runs.pivot(index="seed", columns="configuration", values="status").notna()
    labels = [each.label for each in LEAKY]
    whole = trained.reindex(columns=labels, fill_value=False).all(axis=1)
    known = steps.reindex(columns=labels)[whole].fillna(np.inf).to_numpy(dtype=np.float64)
    if not len(known):
        return "Not every fixed slope has been trained yet."
    if np.isinf(known).all():
        return "It happened at none of the fixed slopes, so there is no order to compare with the paper's."
    in_order = (known[:, 1:] <= known[:, :-1]).all(axis=1) & (known[:, -1] < known[:, 0])
    seeds = "" if len(known) == 1 else f" in {in_order.sum()} of {len(known)} seeds"
    if in_order.any():
        return f"The larger the fixed slope, the earlier (or at the same step){seeds}, as the paper reports."
    return f"This is not the paper's order (the larger the slope, the earlier){seeds and ' in any seed'}."


STUDY = Study(
    name="negative-slope",
    title="Fixed negative slopes without LayerNorm: NaNs and entropy collapse",
    question="Where do fixed slopes break: NaNs and entropy collapse?",
    baseline=RELU.label,
    configurations=lambda preset: (RELU, *LEAKY),
    describe=describe,
    papers=(PAPER,),
)
