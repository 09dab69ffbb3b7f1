"""``normfree interpret``: every interpretability tool on models with and without norms, as frames and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Unpack

import pandas as pd
import torch

from normfree.columns import SINK_QUERY_SHARE, SINK_SHARE
from normfree.errors import InputError
from normfree.files import write_text
from normfree.interpret.confidence_neurons import confidence_neuron_candidates, neuron_output_weights
from normfree.interpret.direct_logit_attribution import direct_attribution_errors
from normfree.interpret.figures import attribution_error_heatmaps, confidence_neurons, patching_agreement
from normfree.interpret.figures import cumulative_ablation as cumulative_ablation_figure
from normfree.interpret.figures import residual_std_by_position as residual_std_figure
from normfree.interpret.neuron_ablation import cumulative_ablation, neuron_ablation_effects
from normfree.interpret.patching import PromptPairs, agreement, patch_heads
from normfree.interpret.prompts import induction_pairs, read_prompts
from normfree.interpret.sequences import ComparedModels, SequenceOptions, TokenSequences, tokenizer_of
from normfree.interpret.sinks import attention_sinks, residual_std_by_position
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.float32_products import FastProducts
from normfree.progress import stage
from normfree.report import FIGURES_FOLDER, Callout, Section, Table, figure_section, weights_entry, write_page

FRAMES = (
    "attribution_errors",
    "patches",
    "neuron_weights",
    "neuron_effects",
    "cumulative_ablation",
    "sinks",
    "residual_stds",
)
"""The CSV files, by name."""
TOGETHER = 5
"""Candidate confidence neurons that are ablated together, at most."""
_COLUMNS = {
    "model": "Model",
    "attribution_nmae": "Error of attribution",
    "patching_pearson": "Patching: correlation",
    "patching_nmae": "Patching: error",
    "norm_mediated_share": "Through the norm",
    SINK_SHARE: "Sink share",
    SINK_QUERY_SHARE: "Sink rate",
    "first_token_std_ratio": "First token's std, ratio",
}
_NOTES = (
    "Error of attribution: mean |attribution - measured direct effect| over mean |effect| of a head, median over "
    "heads.",
    "Patching: attribution patching against activation patching of the heads.",
    "Through the norm: share of a candidate neuron's effect on the loss that the final norm mediates.",
    "Sink share: mean attention to the first token. Sink rate: share of heads and queries that pay it more than 0.3.",
)


@dataclass(frozen=True)
class InterpretabilityComparison:
    """The result of :func:`compare_interpretability`.

    models: the frames of :func:`interpret_model`, by the model's name.
    sequences: those that all models read.
    quantization: how weights were quantized, by model; models without are left out.
    loaded_as: device, dtype and, of a model from the Hub, commit, by model.
    """

    models: Mapping[str, Mapping[str, pd.DataFrame]]
    sequences: TokenSequences
    quantization: Mapping[str, str]
    loaded_as: Mapping[str, Mapping[str, str]]

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames of all models by the names of ``FRAMES``, with the column ``model``."""
        found = self.models.items()
        each = {name: [frames[name].assign(model=model) for model, frames in found] for name in FRAMES}
        return {name: pd.concat(frames, ignore_index=True) for name, frames in each.items()}

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a model: model, attribution_nmae, patching_pearson, patching_nmae, norm_mediated_share, sink_share,
        sink_query_share, first_token_std_ratio.

        attribution_nmae is the median over heads, norm_mediated_share the median over the candidate neurons with an
        effect, sink_share and sink_query_share the means over heads, and first_token_std_ratio the residual std of the
        first token after the last block over the median of all other positions.
        """
        return pd.DataFrame([{"model": model, **_summary(frames)} for model, frames in self.models.items()])

    def write(self, folder: Path, command: str) -> None:
        """Writes CSV files, figures and ``report.html``, which quotes ``command``, into ``folder``, made if missing."""
        for name, frame in {**self.frames, "summary": self.summary}.items():
            write_text(folder / f"{name}.csv", frame.to_csv(index=False, na_rep="nan"))
        write_page(
            folder / "report.html",
            title="What the norms hide: interpretability of " + ", ".join(self.models),
            lead=_lead(self.summary),
            sections=self._sections(folder / FIGURES_FOLDER),
            meta={
                "Command": command,
                "Read on": str(self.sequences),
                **weights_entry(self.quantization, self.loaded_as),
            },
        )

    def _sections(self, folder: Path) -> list[Section]:
        frames = self.frames
        formats = dict.fromkeys(list(_COLUMNS.values())[1:], ".3f")
        table = Table(self.summary.rename(columns=_COLUMNS), "One row a model.", formats=formats, notes=_NOTES)
        return [
            Section("Result", [table]),
            figure_section(
                "Direct logit attribution",
                folder,
                "attribution-errors",
                attribution_error_heatmaps(frames["attribution_errors"]),
                "Error of direct logit attribution by head: the contribution with each token's std frozen, against "
                "the change of the logit when the head's output is taken out before the final norm.",
            ),
            figure_section(
                "Attribution patching",
                folder,
                "patching",
                patching_agreement(frames["patches"]),
                "Effect of patching each head's clean output into the corrupted run on the difference of logits: "
                "measured, and guessed from one gradient. A point a head and prompt.",
            ),
            figure_section(
                "Confidence neurons",
                folder,
                "confidence-neurons",
                confidence_neurons(frames["neuron_weights"], frames["neuron_effects"]),
                "Neurons of the last layer: norm of the output weight against its variance over the vocabulary; and "
                "for the candidates, the effect of mean-ablation on the loss, in total and with the final norm's std "
                "frozen.",
                Callout("Candidates are chosen by a rule: large output weight, small variance over the vocabulary."),
            ),
            figure_section(
                "Confidence neurons together",
                folder,
                "cumulative-ablation",
                cumulative_ablation_figure(frames["cumulative_ablation"]),
                "Loss and output entropy while candidates are mean-ablated together, against no ablation: in total, "
                "and dashed with the final norm's std frozen. The first model's candidates, by falling score, in all "
                "models of its shape; in others their own.",
            ),
            figure_section(
                "Sinks and residual norms",
                folder,
                "residual-std",
                residual_std_figure(frames["residual_stds"]),
                "Standard deviation of the residual stream by position, a line a layer.",
            ),
        ]


def compare_interpretability(
    models: Sequence[str] | Mapping[str, str],
    *,
    prompts: Path | None = None,
    n_neuron: int = 20,
    device: str | None = None,
    dtype: str | None = None,
    **sequences: Unpack[SequenceOptions],
) -> InterpretabilityComparison:
    """Runs every tool on each of ``models``, on the same sequences and prompts, one model in memory at a time.

    Args:
        models: Hub ids, model folders, GGUF files or runs; or a mapping from names to these.
        prompts: a file of prompt pairs (see :func:`~normfree.interpret.read_prompts`); default: induction prompts
            made from the sequences, half as many.
        n_neuron: candidate confidence neurons to ablate.
        device, dtype: as for :func:`~normfree.training.load_pretrained`.
        sequences: as for :func:`~normfree.interpret.token_sequences`, for the first model; default: 64 sequences.

    Raises:
        InputError: a model cannot be loaded or is of a kind the tools cannot read, the models have different
            vocabularies, or the sequences or prompts do not fit.
    """
    compared = ComparedModels.of(models, 64, sequences, device=device, dtype=dtype)
    read, beginning = compared.sequences, compared.sequences.beginning
    if len(beginning) > 1:
        raise InputError(
            f"sequences of {compared.loaded.source} begin with {' '.join(beginning.tokens)}, and the tools here "
            "predict all tokens but the first; give --no-bos"
        )
    if prompts is not None:
        pairs = read_prompts(prompts, tokenizer_of(compared.loaded), beginning)
    else:
        pairs = induction_pairs(read.tokens, max(1, len(read.tokens) // 2), n_beginning=len(beginning))
    found: dict[str, dict[str, pd.DataFrame]] = {}
    together: dict[tuple[int, int], pd.DataFrame] = {}
    for name, each in compared:
        with stage(f"{name}: {read}, {len(pairs.answers)} prompts, {n_neuron} neurons"):
            model = each.as_normfree()
            neurons = together.get(_shape(model))
            found[name] = interpret_model(model, read.tokens, pairs, n_neuron=n_neuron, together=neurons)
        if len(found) == 1:
            together[_shape(model)] = found[name]["cumulative_ablation"][1:]
    return InterpretabilityComparison(found, read, compared.quantization, compared.loaded_as)


@FastProducts()
def interpret_model(
    model: NormfreeForCausalLM,
    sequences: torch.Tensor,
    pairs: PromptPairs,
    *,
    n_neuron: int,
    together: pd.DataFrame | None = None,
) -> dict[str, pd.DataFrame]:
    """Every tool on one model, by the names of ``FRAMES``.

    attribution_errors: :func:`~normfree.interpret.direct_attribution_errors` of the heads.
    patches: :func:`~normfree.interpret.patch_heads`.
    neuron_weights, neuron_effects: of the last layer's neurons, and of its ``n_neuron`` candidate confidence neurons.
    cumulative_ablation: of the neurons ``together``, by default the first ``TOGETHER`` candidates.
    sinks, residual_stds: :func:`~normfree.interpret.attention_sinks`,
        :func:`~normfree.interpret.residual_std_by_position`.

    Raises:
        InputError: the model is of a kind the tools cannot read, or the sequences or pairs do not fit it.
    """
    weights = neuron_output_weights(model, [model.config.n_layer - 1])
    candidates = confidence_neuron_candidates(weights, n_neuron)
    together = candidates[:TOGETHER] if together is None else together
    return {
        "attribution_errors": direct_attribution_errors(model, sequences).heads,
        "patches": patch_heads(model, pairs),
        "neuron_weights": weights,
        "neuron_effects": neuron_ablation_effects(model, sequences, candidates),
        "cumulative_ablation": cumulative_ablation(model, sequences, together),
        "sinks": attention_sinks(model, sequences),
        "residual_stds": residual_std_by_position(model, sequences),
    }


def _shape(model: NormfreeForCausalLM) -> tuple[int, int]:
    """Layers, and neurons of each."""
    return model.config.n_layer, model.config.n_inner


def _summary(frames: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    patched = agreement(frames["patches"])
    stds = frames["residual_stds"]
    last = stds[stds["layer"] == stds["layer"].max()].set_index("position")["residual_std"]
    return {
        "attribution_nmae": frames["attribution_errors"]["nmae"].median(skipna=False),
        "patching_pearson": patched.pearson,
        "patching_nmae": patched.nmae,
        "norm_mediated_share": frames["neuron_effects"]["norm_mediated_share"].median(),
        SINK_SHARE: frames["sinks"][SINK_SHARE].mean(skipna=False),
        SINK_QUERY_SHARE: frames["sinks"][SINK_QUERY_SHARE].mean(skipna=False),
        "first_token_std_ratio": float(last.iloc[0] / last.iloc[1:].median()),
    }


def _lead(summary: pd.DataFrame) -> str:
    """The summary in words that hold for any numbers."""
    return " ".join(
        f"{row['model']}: direct logit attribution misses the measured direct effect of a head by "
        f"{100 * row['attribution_nmae']:.1f} % (median); attribution patching correlates with activation patching at "
        f"{row['patching_pearson']:.3f}; the final norm mediates {100 * row['norm_mediated_share']:.0f} % of what the "
        "candidate confidence neurons do to the loss (median)."
        for row in summary.to_dict("records")
    )
