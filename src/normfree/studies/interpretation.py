"""What interpretability gains from a model without norms: its tools on one or several models, as one page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from normfree.files import write_text
from normfree.interpret import (
    PromptPairs,
    agreement,
    attention_sinks,
    confidence_neuron_candidates,
    direct_attribution_errors,
    neuron_ablation_effects,
    neuron_output_weights,
    patch_heads,
    residual_std_by_position,
)
from normfree.modeling import NormfreeForCausalLM
from normfree.report import (
    Callout,
    Section,
    Table,
    attribution_error_heatmaps,
    confidence_neurons,
    patching_agreement,
    render_report,
    weights_entry,
    write_report,
)
from normfree.report import residual_std_by_position as residual_std_figure
from normfree.runner import FIGURES_FOLDER, saved_figure

FRAMES = ("attribution_errors", "patches", "neuron_weights", "neuron_effects", "sinks", "residual_stds")
"""The CSV files, by name."""


def interpret(
    model: NormfreeForCausalLM, sequences: torch.Tensor, pairs: PromptPairs, *, n_neuron: int
) -> dict[str, pd.DataFrame]:
    """Every tool on one model, by the names of ``FRAMES``.

    attribution_errors: :func:`~normfree.interpret.direct_attribution_errors` of the heads.
    patches: :func:`~normfree.interpret.patch_heads`.
    neuron_weights, neuron_effects: of the last layer's neurons, and of its ``n_neuron`` candidates for confidence
        neurons.
    sinks, residual_stds: :func:`~normfree.interpret.attention_sinks`,
        :func:`~normfree.interpret.residual_std_by_position`.

    Raises:
        InputError: the model is of a kind the tools cannot read, or the sequences or pairs do not fit it.
    """
    weights = neuron_output_weights(model, [model.config.n_layer - 1])
    return {
        "attribution_errors": direct_attribution_errors(model, sequences).heads,
        "patches": patch_heads(model, pairs),
        "neuron_weights": weights,
        "neuron_effects": neuron_ablation_effects(model, sequences, confidence_neuron_candidates(weights, n_neuron)),
        "sinks": attention_sinks(model, sequences),
        "residual_stds": residual_std_by_position(model, sequences),
    }


def write_interpretation(
    found: Mapping[str, Mapping[str, pd.DataFrame]],
    folder: Path,
    command: str,
    *,
    sequences: str,
    quantized: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Writes what :func:`interpret` found of each model, by name, into ``folder``: CSV files, figures, ``report.html``.

    The page names the ``sequences`` that the models read, and how weights were ``quantized``, by model.

    Returns:
        The summary, one row a model: model, attribution_nmae (median over the heads), patching_pearson,
        patching_nmae, norm_mediated_share (median over the candidate neurons that have any effect), sink_share (mean
        over the heads), first_token_std_ratio (residual std after the last block: of the first token, over the median
        of all other positions).
    """
    frames = {
        name: pd.concat([of_model[name].assign(model=model) for model, of_model in found.items()], ignore_index=True)
        for name in FRAMES
    }
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False, na_rep="nan"))
    table = pd.DataFrame([{"model": model, **_summary(of_model)} for model, of_model in found.items()])
    write_text(folder / "summary.csv", table.to_csv(index=False, na_rep="nan"))
    page = render_report(
        title="What the norms hide: interpretability of " + ", ".join(found),
        lead=_lead(table),
        sections=_sections(frames, table, folder / FIGURES_FOLDER),
        meta={
            "Made by": f"normfree {version('normfree')}",
            "Date": date.today().isoformat(),
            "Command": command,
            "Read on": sequences,
            **weights_entry(quantized),
        },
    )
    write_report(folder / "report.html", page)
    return table


def _summary(of_model: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    patched = agreement(of_model["patches"])
    stds = of_model["residual_stds"]
    last = stds[stds["layer"] == stds["layer"].max()].set_index("position")["residual_std"]
    return {
        "attribution_nmae": of_model["attribution_errors"]["nmae"].median(skipna=False),
        "patching_pearson": patched.pearson,
        "patching_nmae": patched.nmae,
        "norm_mediated_share": of_model["neuron_effects"]["norm_mediated_share"].median(),
        "sink_share": of_model["sinks"]["sink_share"].mean(skipna=False),
        "first_token_std_ratio": float(last.iloc[0] / last.iloc[1:].median()),
    }


def _sections(frames: Mapping[str, pd.DataFrame], table: pd.DataFrame, folder: Path) -> list[Section]:
    names = {
        "model": "Model",
        "attribution_nmae": "Error of attribution",
        "patching_pearson": "Patching: correlation",
        "patching_nmae": "Patching: error",
        "norm_mediated_share": "Through the norm",
        "sink_share": "Sink share",
        "first_token_std_ratio": "First token's std, ratio",
    }
    return [
        Section(
            "Result",
            [
                Table(
                    table.rename(columns=names),
                    "One row a model.",
                    formats=dict.fromkeys(list(names.values())[1:], ".3f"),
                    notes=[
                        "Error of attribution: mean |attribution - measured direct effect| over mean |effect| of a "
                        "head, median over heads.",
                        "Patching: attribution patching against activation patching of the heads.",
                        "Through the norm: share of a candidate neuron's effect on the loss that the final norm "
                        "mediates.",
                    ],
                )
            ],
        ),
        Section(
            "Direct logit attribution",
            [
                saved_figure(
                    folder,
                    "attribution-errors",
                    attribution_error_heatmaps(frames["attribution_errors"]),
                    "Error of direct logit attribution by head: the contribution with each token's std frozen, against "
                    "the change of the logit when the head's output is taken out before the final norm.",
                )
            ],
        ),
        Section(
            "Attribution patching",
            [
                saved_figure(
                    folder,
                    "patching",
                    patching_agreement(frames["patches"]),
                    "Effect of patching each head's clean output into the corrupted run on the difference of logits: "
                    "measured, and guessed from one gradient. A point a head and prompt.",
                )
            ],
        ),
        Section(
            "Confidence neurons",
            [
                saved_figure(
                    folder,
                    "confidence-neurons",
                    confidence_neurons(frames["neuron_weights"], frames["neuron_effects"]),
                    "Neurons of the last layer: norm of the output weight against its variance over the vocabulary; "
                    "and for the candidates, the effect of mean-ablation on the loss, in total and with the final "
                    "norm's std frozen.",
                ),
                Callout("Candidates are chosen by a rule: large output weight, small variance over the vocabulary."),
            ],
        ),
        Section(
            "Sinks and residual norms",
            [
                saved_figure(
                    folder,
                    "residual-std",
                    residual_std_figure(frames["residual_stds"]),
                    "Standard deviation of the residual stream by position, a line a layer.",
                )
            ],
        ),
    ]


def _lead(table: pd.DataFrame) -> str:
    """The summary in words that hold whatever the numbers are."""
    return " ".join(
        f"{row['model']}: direct logit attribution misses the measured direct effect of a head by "
        f"{100 * row['attribution_nmae']:.1f} % (median); attribution patching correlates with activation patching at "
        f"{row['patching_pearson']:.3f}; the final norm mediates {100 * row['norm_mediated_share']:.0f} % of what the "
        "candidate confidence neurons do to the loss (median)."
        for row in table.to_dict("records")
    )
