"""Hybrid activations without LayerNorm (ReLU's Revival, Appendix D): GELU in some layers, ReLU in the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from normfree.columns import ENTROPY_NATS, EVAL_PPL
from normfree.report import Section, paper_style
from normfree.report.entropy_figures import nats
from normfree.report.frames import HEAD_ENTROPY, check_frame, check_one_setting, in_order
from normfree.report.overload import perplexity_and_overload
from normfree.report.primitives import annotated_heatmap, colour_bar
from normfree.report.style import TWO_COLUMN, entropy_colours
from normfree.runner import Configuration, Findings, Preset, Study, StudyPage, head_entropy_frame
from normfree.studies.relu_revival import GELU, PAPER, RELU, scale_limits

LETTERS = {"gelu": "G", "relu": "R"}


def hybrid(first: str, then: str, split: int, n_layer: int) -> Configuration:
    """``first`` in the first ``split`` layers and ``then`` in the others, such as ``SM+G2R4``."""
    return Configuration(
        f"SM+{LETTERS[first]}{split}{LETTERS[then]}{n_layer - split}",
        {"norm": "none", "activation": [first] * split + [then] * (n_layer - split)},
    )


def configurations(preset: Preset) -> tuple[Configuration, ...]:
    """Every split point of both orders, between the two models with one activation throughout."""
    n_layer = preset.n_layer
    splits = range(1, n_layer)
    return (
        GELU,
        RELU,
        *(hybrid("gelu", "relu", split, n_layer) for split in splits),
        *(hybrid("relu", "gelu", split, n_layer) for split in splits),
    )


def describe(page: StudyPage) -> Findings:
    """Perplexity and overload by split point, and which layers' entropy follows which layers' activation."""
    splits = _splits(page)
    heads = head_entropy_frame(page.results)
    gelu_layers = {
        each.label: [place for place, name in enumerate(_activations(page, each)) if name == "gelu"]
        for each in configurations(page.folder.preset)
    }
    sections = [
        Section(
            "By split point",
            [
                page.figure(
                    "split-point",
                    perplexity_and_overload(splits, changed="layers with the first activation"),
                    "Perplexity and share of heads in the top quarter of the entropy range (the overload of the paper) "
                    "by the number of layers that have the first activation; the ends are SM+G and SM+R themselves.",
                ),
                page.figure(
                    "entropy-by-layer",
                    layer_entropy_by_configuration(heads, marked=gelu_layers, mark="GELU", maximum=page.uniform_bound),
                    "Attention entropy by layer, mean over heads: final weights, evaluation tokens. A dot marks the "
                    "layers whose feed-forward network has GELU.",
                ),
                page.loss_figure(),
            ],
        )
    ]
    return Findings(_lead(splits), sections, scale_limits(page).strip())


def _activations(page: StudyPage, configuration: Configuration) -> list[str]:
    activation = configuration.model["activation"]
    return [activation] * page.folder.preset.n_layer if isinstance(activation, str) else list(activation)


def _splits(page: StudyPage) -> pd.DataFrame:
    """One row an order of the two activations (``line``) and a split point (``place``)."""
    n_layer = page.folder.preset.n_layer
    whole = {"gelu": GELU.label, "relu": RELU.label}
    rows = []
    for order, first, then in (("GELU first", "gelu", "relu"), ("ReLU first", "relu", "gelu")):
        splits = (hybrid(first, then, split, n_layer).label for split in range(1, n_layer))
        for place, label in enumerate((whole[then], *splits, whole[first])):
            if label in page.overload:
                rows.append({"line": order, "place": place, "value": str(place), **page.overload[label]})
    return pd.DataFrame(rows)


def _lead(splits: pd.DataFrame) -> str:
    """The best split, and the layer whose activation matters most."""
    finite = splits.dropna(subset=[EVAL_PPL]).drop_duplicates("configuration").sort_values(EVAL_PPL)
    if finite.empty:
        return "Every run diverged."
    best, worst = finite.iloc[0], finite.iloc[-1]
    sentences = [
        f"Lowest perplexity: {best['configuration']} ({best['eval_ppl']:.1f}); "
        f"highest: {worst['configuration']} ({worst['eval_ppl']:.1f})."
    ]
    for order, words in (
        ("GELU first", "GELU in place of ReLU from the first layer on"),
        ("ReLU first", "ReLU in place of GELU from the first layer on"),
    ):
        path = splits[splits["line"] == order].sort_values("place")
        steps = np.diff(path[EVAL_PPL].to_numpy())
        is_whole = (np.diff(path["place"]) == 1).all()
        if len(steps) and is_whole and np.isfinite(steps).all():
            layer = int(np.abs(steps).argmax())
            sentences.append(f"With {words}, perplexity changes most ({steps[layer]:+.1f}) at layer {layer}.")
    return " ".join(sentences)


_NARROWEST_TEXT = 0.34
"""Width in inches of a cell that holds a number and a dot."""


@paper_style()
def layer_entropy_by_configuration(
    head_entropy: pd.DataFrame, *, marked: Mapping[str, Sequence[int]], mark: str, maximum: float
) -> Figure:
    """Entropy by layer (columns) and configuration (rows), mean over heads and seeds, in nats; NaN is hatched.

    Where the cells of a deep model are too narrow for numbers, they hold the dots alone.

    Args:
        head_entropy: columns model, context_length, configuration, seed, layer, head, entropy_nats.
        marked: for each configuration the layers that get a dot.
        mark: what the dot says, such as "GELU".
        maximum: the top of the colour scale, such as the uniform bound.

    Raises:
        InputError: a column is missing, a head occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, (ENTROPY_NATS,))
    check_one_setting(head_entropy, "head_entropy")
    configurations = in_order(head_entropy["configuration"])
    layers = sorted(in_order(head_entropy["layer"]))
    means = head_entropy.groupby(["configuration", "layer"])[ENTROPY_NATS].agg(lambda x: x.mean(skipna=False))
    values = means.unstack("layer").loc[configurations, layers].to_numpy(dtype=np.float64)
    width = min(TWO_COLUMN, 1.6 + 0.48 * max(len(layers), 3))
    height = max(min(0.22 * len(configurations), 7.8), 0.13 * len(configurations), 1.0)
    figure = Figure(figsize=(width, 0.8 + height), layout="constrained")
    axes = figure.subplots()
    is_wide = (width - 1.6) / len(layers) >= _NARROWEST_TEXT
    dots = [["\N{BULLET} " * (layer in marked.get(name, ())) for layer in layers] for name in configurations]
    numbers = [[nats(value) if is_wide else "" for value in row] for row in values]
    # np.strings.add needs NumPy 2.
    text = np.char.add(dots, numbers)
    norm, colours = Normalize(0, maximum), entropy_colours()
    annotated_heatmap(axes, values, norm, colours, rows=configurations, columns=layers, text=text, fontsize=5.5)
    axes.set_xlabel(f"layer (dot: {mark})")
    colour_bar(figure, axes, norm, colours, "attention entropy (nats)")
    return figure


STUDY = Study(
    name="hybrid-activations",
    title="GELU in some layers and ReLU in the others, without LayerNorm",
    question="GELU in some layers and ReLU in the others: which layers matter?",
    baseline=GELU.label,
    configurations=configurations,
    describe=describe,
    papers=(PAPER,),
)
