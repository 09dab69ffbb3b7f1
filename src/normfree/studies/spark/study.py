"""Sparse layers against dense ones ("Spark Transformer", 2025), with norms and, which the paper has not, without."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from normfree.columns import ACTIVE_SHARE, ATTENDED_KEYS, DELTA_PERCENT, EVAL_LOSS
from normfree.data import PackedData
from normfree.modeling import NormfreeConfig
from normfree.probes.sparsity_probe import SparsityProbe
from normfree.progress import stage
from normfree.report import Element, Link, Paragraph, Section, Table, load_published, mean_confidence_interval
from normfree.report.frames import seed_pairs
from normfree.report.overload import perplexity_and_overload
from normfree.runner import (
    Configuration,
    Findings,
    Measurement,
    Preset,
    Study,
    StudyPage,
    final_checkpoint,
    measured_frame,
    run_config,
    run_key,
)
from normfree.spark.accounting import decode_cost, total_flops
from normfree.spark.sizes import SparkSizes
from normfree.studies.relu_revival import LAYERNORM_GELU, LAYERNORM_RELU, RELU
from normfree.studies.spark.decode_seconds import decode_seconds
from normfree.studies.spark.figures import active_neurons, sparsity_table
from normfree.training import RunResult, load_pretrained, load_run_config
from normfree.training.records import LAYERS_FILE, METRICS_FILE, write_parquet
from normfree.training.run_config import read_yaml
from normfree.training.run_folder import CONFIG_FILE

SPARSITY_FILE = "sparsity.parquet"
DECODE_FILE = "decode.parquet"
BATCH_SIZE = 16
FFN_ACTIVE = 0.08
ATTENTION_ACTIVE = 0.125
"""Share of the positions: 256 keys, the paper's k, would be all of a small model's."""
ACTIVE_SHARES = (0.02, 0.04, 0.08, 0.16, 0.32, 1.0)
PREDICTOR_SHARES = (0.125, 0.25, 0.5, 0.75)
"""Of the input's dimensions, those that choose the neurons; the others compute them."""

NO_PREDICTOR = Configuration("no predictor", {**LAYERNORM_GELU.model, "ffn": "topk", "ffn_active": FFN_ACTIVE})
"""A dense network that keeps 8 % of its neurons."""

_SPARK_OPTIONS = (*(each.name for each in fields(SparkSizes)), "ffn", "attention", "topk")
_FFN = {"ffn": "spark", "ffn_active": FFN_ACTIVE}
_ATTENTION = {"attention": "spark", "attention_active": ATTENTION_ACTIVE}
_EAGER = {"attn_implementation": "eager"}
SPARK_FFN = Configuration("Spark-FFN", {**LAYERNORM_GELU.model, **_FFN})
_GATED = ", gated"
_NETWORKS: dict[str, dict[str, Any]] = {
    "": {},
    _GATED: {"ffn": "gated"},
    ", Spark-FFN, all": {**_FFN, "ffn_active": 1.0},
    ", Spark-FFN": _FFN,
    ", Spark-FFN (exact)": {**_FFN, "topk": "exact"},
}
"""What the feed-forward network is, by what is added to the label of the dense model."""
_NORMS = {True: "With norms", False: "Without"}
CONFIGURATIONS = (
    LAYERNORM_GELU,
    LAYERNORM_RELU,
    SPARK_FFN,
    Configuration("Spark-FFN (exact)", {**SPARK_FFN.model, "topk": "exact"}),
    Configuration("Spark-attention", {**LAYERNORM_GELU.model, **_ATTENTION}, _EAGER),
    Configuration("Spark", {**LAYERNORM_GELU.model, **_FFN, **_ATTENTION}, _EAGER),
    RELU,
    Configuration("SM+R, Spark-FFN", {**RELU.model, **_FFN}),
    Configuration("SM+R, Spark", {**RELU.model, **_FFN, **_ATTENTION}, _EAGER),
)


def active(share: float) -> Configuration:
    """A model with norms and sparse feed-forward networks that aim at ``share`` of their neurons."""
    return Configuration(f"active {100 * share:g} %", {**LAYERNORM_GELU.model, "ffn": "spark", "ffn_active": share})


def predicting(share: float) -> Configuration:
    """The same with 8 % of the neurons, chosen by ``share`` of the dimensions."""
    return Configuration(f"predictor {100 * share:g} %", {**SPARK_FFN.model, "ffn_predictor_dim": share})


def measure(result: RunResult, data: PackedData, console: Console) -> None:
    """Writes ``sparsity.parquet`` into the run's folder, unless it is there: layer, active_share, attended_keys.

    For a model that decodes sparsely, also ``decode.parquet`` (see :func:`decode_seconds`). On final weights and all
    evaluation sequences; NaN for a run that diverged, and for the attended keys of softmax attention.
    """
    _measure_sparsity(result, data, console)
    _measure_decode(result, console)


def _measure_sparsity(result: RunResult, data: PackedData, console: Console) -> None:
    path = result.folder / SPARSITY_FILE
    if path.exists():
        return
    checkpoint = final_checkpoint(result)
    if checkpoint is None:
        layers = sorted(result.head_entropy["layer"].unique())
        write_parquet(pd.DataFrame({"layer": layers, ACTIVE_SHARE: np.nan, ATTENDED_KEYS: np.nan}), path)
        return
    model = load_pretrained(str(checkpoint)).as_normfree()
    sequences, _ = data.eval.whole()
    told = f"{result.row['configuration']} seed {result.row['seed']}: sparsity"
    with stage(told), SparsityProbe(model) as probe, torch.inference_mode():
        for batch in sequences.split(BATCH_SIZE):
            model(batch.to(model.device), use_cache=False)
    shares, keys = probe.active_share().numpy(), probe.attended_keys().numpy()
    write_parquet(pd.DataFrame({"layer": range(len(shares)), ACTIVE_SHARE: shares, ATTENDED_KEYS: keys}), path)


def _measure_decode(result: RunResult, console: Console) -> None:
    path, checkpoint = result.folder / DECODE_FILE, final_checkpoint(result)
    if path.exists() or checkpoint is None:
        return
    config = _model_config(result)
    if "spark" not in (config.ffn, config.attention) or config.topk != "statistical":
        return
    model = load_pretrained(str(checkpoint)).as_normfree()
    with stage(f"{result.row['configuration']} seed {result.row['seed']}: seconds of decode"):
        write_parquet(decode_seconds(model, _model_config(result, without=_SPARK_OPTIONS)), path)


def dynamics_frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """model, context_length, configuration, seed, step, tokens, layer, active_share: training batches."""
    frames = []
    for result in results:
        layers, metrics = (pd.read_parquet(result.folder / name) for name in (LAYERS_FILE, METRICS_FILE))
        shares = layers.loc[layers["name"] == ACTIVE_SHARE, ["step", "layer", "value"]]
        tokens_per_step = int((metrics["tokens"] / metrics["step"]).max())
        frames.append(
            shares.rename(columns={"value": ACTIVE_SHARE}).assign(
                tokens=shares["step"] * tokens_per_step, **run_key(result)
            )
        )
    return pd.concat(frames, ignore_index=True)


def savings_frame(results: Iterable[RunResult], sparsity: pd.DataFrame) -> pd.DataFrame:
    """model, context_length, configuration, seed, flops: per token on paper, for what was measured of the run.

    The mean over the positions of a sequence, without the unembedding; NaN for a run that diverged.
    """
    measured = sparsity.set_index(["configuration", "seed"])
    rows = []
    for result in results:
        key = run_key(result)
        layers = measured.loc[[(key["configuration"], key["seed"])]].sort_values("layer")
        rows.append({**key, "flops": _flops(_model_config(result), key["context_length"], layers)})
    return pd.DataFrame(rows)


def _flops(config: NormfreeConfig, sequence_length: int, layers: pd.DataFrame) -> float:
    if layers[ACTIVE_SHARE].isna().any():
        return float("nan")
    costs = decode_cost(
        config,
        context_length=(sequence_length + 1) / 2,
        active_share=layers[ACTIVE_SHARE].tolist(),
        attended_keys=layers[ATTENDED_KEYS].tolist() if config.attention == "spark" else None,
    )
    return total_flops(costs, unembedding=False)


def _model_config(result: RunResult, without: Collection[str] = ()) -> NormfreeConfig:
    """The run's model, or one that has the default for some of its options."""
    path = result.folder / CONFIG_FILE
    vocab_size = read_yaml(path)["provenance"]["corpus"]["vocab_size"]
    config = load_run_config(path)
    options = {name: value for name, value in config.model.items() if name not in without}
    return config.model_copy(update={"model": options}).build_model_config(vocab_size)


def describe(page: StudyPage) -> Findings:
    """Measured sparsity and what it saves on paper, the entropy of heads, and what the paper reports."""
    sections = [*_sparsity_sections(page, nominal=FFN_ACTIVE), _overload_section(page), _published_section()]
    return Findings(_lead(page.table, LAYERNORM_GELU.label), sections, _LIMITS)


def describe_norms(page: StudyPage) -> Findings:
    """What each step from a dense to a sparse network costs, with norms and without."""
    sections = [_cost_section(page), *_sparsity_sections(page, nominal=FFN_ACTIVE)]
    return Findings(_lead(page.table, LAYERNORM_RELU.label), sections, _LIMITS)


def describe_curve(page: StudyPage) -> Findings:
    """Perplexity by the share of neurons that top-k aims at, and what is measured."""
    by_share = _by_share(
        page,
        {100 * share: active(share) for share in ACTIVE_SHARES},
        "neurons kept (%)",
        "the share of neurons that top-k aims at. At 100 % nothing is cut off: the product of the two parts alone.",
    )
    return Findings(
        _lead(page.table, LAYERNORM_GELU.label), [*by_share, *_sparsity_sections(page, nominal=None)], _LIMITS
    )


def describe_predictor(page: StudyPage) -> Findings:
    """Perplexity by the share of the input that chooses the neurons, and what is measured."""
    by_share = _by_share(
        page,
        {**{100 * share: predicting(share) for share in PREDICTOR_SHARES}, 100: NO_PREDICTOR},
        "dimensions that choose (%)",
        "the share of the input's dimensions that choose the neurons; the others compute them. At 100 % there is no "
        "predictor: a dense network keeps its largest neurons.",
    )
    sections = [*by_share, *_sparsity_sections(page, nominal=FFN_ACTIVE)]
    return Findings(_lead(page.table, LAYERNORM_GELU.label), sections, _LIMITS)


def _by_share(page: StudyPage, shares: Mapping[float, Configuration], changed: str, what: str) -> list[Section]:
    """The figure of perplexity by ``shares``, in percent; none before one of them is trained."""
    rows = [
        {"line": SPARK_FFN.label, "place": place, "value": f"{share:g}", **page.overload[each.label]}
        for place, (share, each) in enumerate(shares.items())
        if each.label in page.overload
    ]
    if not rows:
        return []
    level = {**page.overload[LAYERNORM_GELU.label], "configuration": f"{LAYERNORM_GELU.label}, dense"}
    figure = page.figure(
        "perplexity-by-share",
        perplexity_and_overload(pd.DataFrame(rows), changed=changed, level=level),
        f"Perplexity and share of heads in the top quarter of the entropy range by {what} Dashed: the dense network.",
    )
    return [Section("By share", [figure])]


def _sparsity_sections(page: StudyPage, *, nominal: float | None) -> list[Section]:
    measured, sections = page.measured(SPARSITY_FILE)
    if measured:
        sparsity = measured_frame(measured, SPARSITY_FILE)
        timed = [each for each in measured if (each.folder / DECODE_FILE).exists()]
        decode = measured_frame(timed, DECODE_FILE) if timed else None
        table = sparsity_table(sparsity, savings_frame(measured, sparsity), decode, baseline=page.baseline)
        blocks: list[Element] = [
            Paragraph(
                "A neuron is active where what enters the last projection of its feed-forward network is not zero: for "
                "plain ReLU that is natural sparsity. Keys attended are those with a weight above zero, a mean over "
                "queries, early ones with few keys to see included. FLOPs are counted on paper for the sparsity "
                "measured, as the mean over the positions of a sequence, without the unembedding. In training "
                "everything is computed. Decode was timed: passes over one token of one sequence, by the sparse model "
                "and by a dense one of the same shape, which take turns in one process."
            ),
            Table(
                table,
                "Sparsity of the final weights on evaluation tokens, FLOPs per token on paper, and the time that dense "
                "decode takes over that of sparse decode.",
                notes=_NOTES,
            ),
            page.figure(
                "active-neurons",
                active_neurons(sparsity, dynamics_frame(measured), nominal=nominal),
                "Active neurons: by layer after training, and over training on training batches"
                + (f"; the dashed line is what top-k aims at, {100 * nominal:g} %." if nominal else "."),
            ),
        ]
        sections = [Section("Sparsity", blocks), *sections]
    return sections


def costs_frame(losses: pd.DataFrame) -> pd.DataFrame:
    """What each network of the study ``spark-norms`` costs over the dense one with the same norms.

    Args:
        losses: configuration, seed, eval_loss.

    Returns:
        A row for each network whose dense counterpart was trained: network, norms (bool), seeds, nats (mean over the
        seeds that both have of the difference in evaluation loss), nats_half_width (of a 95 % t-interval; NaN for one
        seed).
    """
    rows = []
    for network in [name for name in _NETWORKS if name]:
        for dense in (LAYERNORM_RELU, RELU):
            alone, changed = seed_pairs(losses, dense.label, dense.label + network, EVAL_LOSS)
            if len(alone):
                cost = mean_confidence_interval((changed - alone).tolist())
                rows.append(
                    {
                        "network": network.removeprefix(", "),
                        "norms": dense is LAYERNORM_RELU,
                        "seeds": cost.n,
                        "nats": cost.mean,
                        "nats_half_width": (cost.high - cost.low) / 2,
                    }
                )
    return pd.DataFrame(rows, columns=["network", "norms", "seeds", "nats", "nats_half_width"])


def _cost_section(page: StudyPage) -> Section:
    costs = costs_frame(page.recipe_runs)
    shown = pd.DataFrame(
        [
            {"Network": network, **{_NORMS[each["norms"]]: _nats(each) for _, each in rows.iterrows()}}
            for network, rows in costs.groupby("network", sort=False)
        ]
    )
    caption = "Evaluation loss over that of the dense ReLU network with the same norms, nats per token."
    return Section("What each step costs", [Table(shown, caption, notes=(_NOTES[0], *_NETWORK_NOTES))])


def _nats(row: pd.Series) -> str:
    told = f"{row['nats']:+.3f}".replace("-", "−")
    return told if np.isnan(row["nats_half_width"]) else f"{told} ± {row['nats_half_width']:.3f}"


def _overload_section(page: StudyPage) -> Section:
    return Section(
        "Heads",
        [
            page.head_entropy_figure(
                "Of sparse attention it is that of the softmax over the attended keys, before the gates, and k keys "
                "allow no more than ln k."
            ),
            page.loss_figure(),
        ],
    )


def _published_section() -> Section:
    claims = load_published("spark_transformer_claims")
    shown = pd.DataFrame(
        {
            "Published": claims["quantity"],
            "Value": [f"{value:g} {unit}" for value, unit in zip(claims["value"], claims["unit"], strict=True)],
            "Setting": claims["setting"],
        }
    )
    caption = "Published, not measured here: the abstract of Spark Transformer (arXiv 2506.06644)."
    return Section("What the paper reports", [Table(shown, caption)])


_NOTES = (
    "± is half of a 95 % t-interval over seeds, where there are several.",
    "NaN: at least one of the runs diverged, and has no final weights.",
    "× as fast: of each run the median over rounds. A token of a small model is a few hundred small operations, and "
    "choosing rows adds to them; docs/sparse-decode.md has the times of one that waits for its weights.",
)
_NETWORK_NOTES = (
    "Gated: the product of two parts that both read the whole input, in two thirds of the neurons. Spark-FFN, all: of "
    "two that read a half each, nothing cut off. Then with 8 % of the neurons, by statistical and by exact top-k.",
)
_LIMITS = (
    "Perplexities are comparable only between rows of one table. The paper trains a model of 2 B parameters; at this "
    "size the width of the predictor, the number of neurons and the context are far from its own, and statistical "
    "top-k has fewer entries to take its mean and std from."
)


def _lead(table: pd.DataFrame, baseline: str) -> str:
    """Perplexity against the dense baseline."""
    finite = table.dropna(subset=[DELTA_PERCENT])
    others = finite[finite["loss_difference_over"] != "baseline"].sort_values(DELTA_PERCENT)
    listed = ", ".join(f"{row['configuration']} {row['delta_percent']:+.1f} %" for _, row in others.iterrows())
    diverged = table.loc[table["diverged"] > 0, "configuration"].tolist()
    told = f"Perplexity against dense {baseline}: {listed}." if len(others) else "Every other run diverged."
    return told + (f" Runs diverged: {', '.join(diverged)}." if diverged else "")


_MEASUREMENT = Measurement(check=lambda: None, measure=measure)
_PAPERS = (Link("Spark Transformer, 2025", "https://arxiv.org/abs/2506.06644"),)
STUDY = Study(
    name="spark",
    title="Spark Transformer: sparse feed-forward networks and attention",
    question="What do sparse layers lose against dense ones?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: CONFIGURATIONS,
    describe=describe,
    measurement=lambda preset: _MEASUREMENT,
    papers=_PAPERS,
)


def _with_and_without_norms(preset: Preset) -> tuple[Configuration, ...]:
    width = run_config(preset, RELU, seed=0).build_model_config(preset.data.vocab_size).n_inner
    # three matrices of a gated network are then as many weights as two of a dense one
    narrower = {_GATED: {"n_inner": 2 * width // 3}}
    return tuple(
        Configuration(dense.label + name, {**dense.model, **model, **narrower.get(name, {})})
        for dense in (LAYERNORM_RELU, RELU)
        for name, model in _NETWORKS.items()
    )


CURVE = Study(
    name="spark-active",
    title="Spark Transformer: perplexity by the share of active neurons",
    question="How does perplexity depend on the share of active neurons?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, *(active(share) for share in ACTIVE_SHARES)),
    describe=describe_curve,
    measurement=lambda preset: _MEASUREMENT,
    papers=_PAPERS,
)
PREDICTOR = Study(
    name="spark-predictor",
    title="Spark Transformer: perplexity by the size of the predictor",
    question="How many dimensions are enough to choose the neurons?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, *map(predicting, PREDICTOR_SHARES), NO_PREDICTOR),
    describe=describe_predictor,
    measurement=lambda preset: _MEASUREMENT,
    papers=_PAPERS,
)
NORMS = Study(
    name="spark-norms",
    title="Spark Transformer: what a sparse feed-forward network costs with and without norms",
    question="What does each step from a dense to a sparse network cost with and without norms?",
    baseline=LAYERNORM_RELU.label,
    configurations=_with_and_without_norms,
    describe=describe_norms,
    measurement=lambda preset: _MEASUREMENT,
    papers=_PAPERS,
)
STUDIES = (STUDY, CURVE, PREDICTOR, NORMS)
