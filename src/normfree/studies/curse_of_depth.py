"""The Curse of Depth (Sun et al., 2025): norms and their placements on equal tokens, and what deep layers then do."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console

from normfree.columns import EVAL_PPL, LOSS_NATS
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.interpret import measure_depth, write_depth
from normfree.interpret.depth.comparison import depth_sections
from normfree.progress import stage
from normfree.report import FIGURES_FOLDER, Element, Link, Section, Table, load_published
from normfree.report.frames import SIGNAL_STATISTICS, check_frame
from normfree.report.numbers import mean_and_half, over_seeds
from normfree.report.signal_curves import signal_propagation_dynamics, signal_propagation_over_depth
from normfree.runner import (
    COMPARABLE,
    Configuration,
    Findings,
    Measurement,
    Preset,
    Study,
    StudyPage,
    final_checkpoint,
    measured_frame,
    telemetry_frame,
)
from normfree.training import RunResult, load_pretrained

DYNAMIC_TANH = {"norm": "dyt", "final_norm": "dyt", "dyt_alpha": 1.0, "scale_embeddings": True}
"""As in its paper's language models: α at first that of their smallest width, 1,024, and scaled embeddings."""
DYNAMIC_ERF = {"norm": "derf", "final_norm": "derf", "scale_embeddings": True}
"""With its paper's initial α and s, and scaled embeddings as for Dynamic Tanh."""
PRE_LN, LNS = "Pre-LN", "LayerNorm Scaling"
FOLDER = "depth"
"""In a run's folder: the frames of :class:`~normfree.interpret.DepthMeasurement` as CSV files."""
SEQUENCES = 32
"""Evaluation sequences that the diagnostics are read on."""

DEPTH_SUMMARY = (
    "configuration",
    "seed",
    "n_layer",
    LOSS_NATS,
    "effective_depth",
    "useful_layers",
    "deep_half_share",
    "deep_layer_nats",
    "variance_growth",
    "variance_ratio",
)
_MEANS = {
    "Effective depth": "effective_depth",
    "Useful layers": "useful_layers",
    "Deep half's share, %": "deep_half_percent",
    "Deep layer, 10⁻³ nats": "deep_layer_millinats",
    "Variance, last over first": "variance_ratio",
}


def configurations(preset: Preset) -> tuple[Configuration, ...]:
    """The methods of the paper's Table 1, HybridNorm, Dynamic Tanh, Dynamic erf and no norm in the blocks.

    Norms are of the preset's kind. Four methods appear twice, the second time with residual projections that start
    smaller with depth (GPT-2's 1/√(2 n_layer)): Pre-LN and LayerNorm Scaling, as both limit the residual stream, one at
    the start of training and one throughout; HybridNorm and HybridNorm*, as in their paper.

    Raises:
        InputError: the preset's ``model.norm`` is neither LayerNorm nor RMSNorm.
    """
    kind = str(preset.model.get("norm", "layernorm"))
    if kind not in ("layernorm", "rmsnorm"):
        raise InputError(
            f"curse-of-depth places the norm of its preset in many ways: model.norm must be layernorm or rmsnorm, "
            f"not {kind!r}"
        )
    scaling: dict[str, Any] = {"norm": f"{kind}_scaling"}
    hybrid: dict[str, Any] = {"norm": kind, "norm_placement": "hybrid"}
    hybrid_star: dict[str, Any] = {"norm": kind, "norm_placement": "hybrid_star"}
    scaled_init: dict[str, Any] = {"scale_residual_init": True}
    return (
        Configuration(PRE_LN, {"norm": kind}),
        Configuration(f"{PRE_LN}, scaled init", {"norm": kind, **scaled_init}),
        Configuration("Post-LN", {"norm": kind, "norm_placement": "post"}),
        Configuration("Mix-LN", {"norm": kind, "norm_placement": "mix"}),
        Configuration("DeepNorm", {"norm": kind, "norm_placement": "deepnorm"}),
        Configuration("HybridNorm", hybrid),
        Configuration("HybridNorm, scaled init", {**hybrid, **scaled_init}),
        Configuration("HybridNorm*", hybrid_star),
        Configuration("HybridNorm*, scaled init", {**hybrid_star, **scaled_init}),
        Configuration(LNS, scaling),
        Configuration(f"{LNS}, scaled init", {**scaling, **scaled_init}),
        Configuration("Dynamic Tanh", DYNAMIC_TANH),
        Configuration("Dynamic erf", DYNAMIC_ERF),
        Configuration("No norm", {"norm": "none"}),
    )


def measure(result: RunResult, data: PackedData, console: Console) -> None:
    """Writes the diagnostics of a run's final weights into its folder; a run that diverged has none."""
    folder, checkpoint = result.folder / FOLDER, final_checkpoint(result)
    if (folder / "summary.csv").exists() or checkpoint is None:
        return
    tokens, _ = data.eval.whole(SEQUENCES)
    with stage(f"Measuring {result.row['configuration']} seed {result.row['seed']}"):
        found = measure_depth(load_pretrained(str(checkpoint)).model, tokens)
    write_depth(found.frames(), folder)


def describe(page: StudyPage) -> Findings:
    """The published table, the diagnostics, and whether the deep half of the layers matters more with the scaling."""
    measured, missing = page.measured(f"{FOLDER}/summary.csv")
    dynamics = telemetry_frame(page.results, SIGNAL_STATISTICS)
    sections = [Section("Training", [page.loss_figure(), _published_table()]), *_signal_sections(page, dynamics)]
    lead = _lead(page)
    if measured:
        names = sorted(path.stem for path in (measured[0].folder / FOLDER).glob("*.csv"))
        frames = {name: measured_frame(measured, f"{FOLDER}/{name}.csv") for name in names}
        blocks: list[Element] = [
            Table(
                depth_table(frames["summary"]),
                f"Diagnostics of the trained models on {SEQUENCES} evaluation sequences.",
                notes=_NOTES,
            )
        ]
        sections += [Section("How the layers are used", blocks), *depth_sections(frames, page.path / FIGURES_FOLDER)]
        lead += " " + _deep_half(frames["summary"])
    return Findings(lead, [*sections, *missing], scale_limits(page))


def _signal_sections(page: StudyPage, dynamics: pd.DataFrame) -> list[Section]:
    """What the residual stream is like before the first update and while training; none without telemetry."""
    if dynamics.empty:
        return []
    over_depth = signal_propagation_over_depth(dynamics[dynamics["step"] == 0])
    blocks: list[Element] = [
        page.figure(
            "signal-at-initialization",
            over_depth,
            "The residual stream after each block before the first update, on the first training batch. Token "
            "similarity is the mean cosine between two tokens of a sequence: at 1 all have collapsed onto one "
            "direction, and attention has nothing to tell apart.",
        ),
        page.figure(
            "signal-over-training",
            signal_propagation_dynamics(dynamics),
            "The same while training, at the last layer and at the layer with the largest value; training batches.",
        ),
    ]
    return [Section("Signal propagation", blocks)]


def _published_table() -> Table:
    published = load_published("curse_of_depth_table1")
    shown = published.pivot_table(
        index=["model", "training_tokens_billion"], columns="method", values=EVAL_PPL, sort=False
    ).reset_index()
    shown = shown.rename(columns={"model": "Model", "training_tokens_billion": "Tokens, billions"})
    return Table(
        shown,
        "Published: evaluation perplexity on C4 (The Curse of Depth, Table 1). Not measured by Normfree.",
        formats=dict.fromkeys(shown.columns[2:], ",.2f") | {"Tokens, billions": ".1f"},
    )


def scale_limits(page: StudyPage) -> str:
    """How far the runs' scale is from the paper's, and what their perplexities can be compared with."""
    least = load_published("curse_of_depth_table1")["training_tokens_billion"].min()
    share = page.share_of(1e9 * least, f"the {least:g} billion tokens of the paper's smallest model")
    return f"{share}{COMPARABLE} All methods have one learning rate; with --tune-lr each gets its own."


def _lead(page: StudyPage) -> str:
    """The order of the methods."""
    table = page.table[["configuration", EVAL_PPL]]
    finite = table.dropna().sort_values(EVAL_PPL)
    ranked = ", ".join(f"{row['configuration']} {row['eval_ppl']:.1f}" for _, row in finite.iterrows())
    diverged = [label for label in table["configuration"] if label not in set(finite["configuration"])]
    ending = f" Diverged: {', '.join(diverged)}." if diverged else ""
    return f"Perplexity, lowest first: {ranked}.{ending}" if ranked else "Every run diverged."


def _deep_half(summary: pd.DataFrame) -> str:
    """The cost of a skipped layer of the deeper half, without the scaling and with it."""
    told = []
    for name in (PRE_LN, LNS):
        runs = summary[summary["configuration"] == name]
        if len(runs):
            cost, share = mean_and_half(runs["deep_layer_nats"], digits=4), 100 * runs["deep_half_share"].mean()
            told.append(f"{cost} nats with {name} ({share:.0f} % of what all layers cost one by one)")
    return f"A skipped layer of the deeper half costs {' and '.join(told)}." if told else ""


def depth_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The diagnostics of :func:`normfree.interpret.measure_depth`: ``mean ± half`` of a 95 % t-interval over seeds.

    Where seeds differ in the law of the residual stream's variance, each law has its number of seeds.

    Args:
        summary: the columns ``DEPTH_SUMMARY``, one row a run.

    Raises:
        InputError: a column is missing, or a run occurs twice.
    """
    check_frame(summary, "depth summary", DEPTH_SUMMARY, DEPTH_SUMMARY[2:])
    shares = {"deep_half_percent": 100 * summary["deep_half_share"]}
    table = over_seeds(summary.assign(**shares, deep_layer_millinats=1000 * summary["deep_layer_nats"]), _MEANS)
    growth = []
    for configuration in table["Configuration"]:
        laws = summary.loc[summary["configuration"] == configuration, "variance_growth"].value_counts()
        growth.append(laws.index[0] if len(laws) == 1 else ", ".join(f"{law} ({n})" for law, n in laws.items()))
    return table.assign(**{"Variance grows": growth})


_NOTES = (
    "± is half of a 95 % t-interval over seeds, where there are several.",
    "Effective depth: participation ratio of the loss increases when each layer alone is skipped. Useful layers: those "
    "that cost at least 1 % of the costliest. Deep half's share: of all loss increases. Deep layer: mean increase when "
    "a single layer of the deeper half is skipped.",
    "Variance: of the residual stream after the last block over that after the first, all tokens but the first of a "
    "sequence, and the law that describes its growth best.",
)

DEPTHS = ("depth-12", "depth-24", "depth-48", "depth-96")
LLAMAS = ("llama-60m", "llama-130m", "llama-250m", "llama-350m", "llama-1b")
STUDY = Study(
    name="curse-of-depth",
    title="The Curse of Depth: norms, their placements, and what deep layers do",
    question="Which norms and placements win on equal tokens, and what do deep layers do?",
    presets=("smoke", *DEPTHS, *LLAMAS),
    baseline=PRE_LN,
    configurations=configurations,
    describe=describe,
    measurement=lambda preset: Measurement(lambda: None, measure),
    papers=(Link("The Curse of Depth in Large Language Models, Sun et al. 2025", "https://arxiv.org/abs/2502.05795"),),
)
