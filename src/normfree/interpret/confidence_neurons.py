"""Confidence (entropy) neurons: they write into the unembedding's null space and act through the final norm's std.

Stolfo et al., "Confidence Regulation Neurons in Language Models", 2024, Sections 3 and 4. Without a final norm they
have no effect ("Transformers Don't Need LayerNorm at Inference Time", 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import pandas as pd
import torch

from normfree.errors import InputError
from normfree.interpret.decoder_parts import (
    check_decoder,
    intercepted,
    neuron_projections,
    read_inputs,
    readers_of_residual_stream,
    starting_at,
)
from normfree.interpret.direct_logit_attribution import check_predicting
from normfree.interpret.readout import Readout
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.linear_cross_entropy import linear_cross_entropy
from normfree.progress import track

NULL_SPACE_SHARE = 0.01
"""Share of the directions counted as the unembedding's null space (Stolfo et al., Figure 2f)."""


@torch.no_grad()
def neuron_output_weights(
    model: NormfreeForCausalLM, layers: Sequence[int] | None = None, n_null_directions: int | None = None
) -> pd.DataFrame:
    """The output weights of MLP neurons against the unembedding, from the weights alone, in float64.

    Output weights w (a neuron's column of ``down_proj``) are centred if the final norm centres. The unembedding has the
    final norm's gain and centring folded in and its mean over the vocabulary subtracted.

    Args:
        model: a pre-norm decoder in evaluation mode.
        layers: from 0, negative ones from the end; default: the last.
        n_null_directions: the null space is spanned by so many right singular vectors, those of the smallest singular
            values; default: 1 % of ``n_embd``, at least 1. The direction that a centring norm removes does not count.

    Returns:
        layer, neuron, weight_norm (|w|), logit_variance (LogitVar: the variance over the vocabulary of the cosine of w
        and the token's row of the unembedding; low means little direct effect), null_space_share (|V₀ᵀ w| / |w|, with
        the null directions in V₀) and score: the z-score of ln |w| within the layer minus that of ln LogitVar;
        confidence neurons have the highest. A neuron of zero weight has NaN in all but ``weight_norm``.

    Raises:
        InputError: the model is of another kind, its unembedding holds NaN or Inf, or it lacks the layer or has too few
            directions.
    """
    check_decoder(model)
    n_layer = model.config.n_layer
    for layer in layers or ():
        if not -n_layer <= layer < n_layer:
            raise InputError(f"there is no layer {layer}; the model has the layers 0 to {n_layer - 1}")
    readout = Readout.of(model)
    unembedding = readout.effective_unembedding()
    null_space = _null_space(unembedding, n_null_directions, readout.is_centred)
    unembedding = torch.nn.functional.normalize(unembedding, dim=-1)
    projections = neuron_projections(model)
    tables = []
    for layer in sorted({layer % n_layer for layer in layers or [-1]}):
        weights = readout.centred(projections[layer].weight.double().T)
        norm = weights.norm(dim=-1)
        unit = weights / norm[:, None]
        variance = _variance_over_rows(unembedding, unit)
        columns = {
            "weight_norm": norm,
            "logit_variance": variance,
            "null_space_share": (unit @ null_space).norm(dim=-1),
            "score": _standardized(norm.log()) - _standardized(variance.log()),
        }
        values = {name: column.cpu().numpy() for name, column in columns.items()}
        tables.append(pd.DataFrame({"layer": layer, "neuron": range(len(norm)), **values}))
    return pd.concat(tables, ignore_index=True)


def confidence_neuron_candidates(weights: pd.DataFrame, n: int) -> pd.DataFrame:
    """The ``n`` rows of :func:`neuron_output_weights` with the highest score, in descending order; all if fewer.

    Neurons whose score is NaN are left out.

    Raises:
        InputError: ``n`` is less than 1.
    """
    if n < 1:
        raise InputError(f"cannot choose {n} candidates; choose at least 1")
    return weights.dropna(subset=["score"]).nlargest(n, "score").reset_index(drop=True)


@torch.no_grad()
def neuron_ablation_effects(
    model: NormfreeForCausalLM, sequences: torch.Tensor, neurons: pd.DataFrame, batch_size: int = 8
) -> pd.DataFrame:
    """The effect of mean-ablating single neurons on the loss: in total, and with the final norm's std frozen.

    A neuron's activation is replaced at all positions by its mean over the tokens of ``sequences``. For the frozen
    effect the final norm's σ of each token keeps its value without the ablation, which excludes what σ mediates (Stolfo
    et al., Section 3). Norms inside blocks are never frozen. Without a final norm the two are equal. Each neuron costs
    a pass from its layer on, and the unembedding twice.

    Args:
        model: a pre-norm decoder in evaluation mode.
        sequences: int64 [n, T], T at least 2, no padding.
        neurons: columns layer and neuron, as :func:`confidence_neuron_candidates` returns them.
        batch_size: sequences a pass.

    Returns:
        layer, neuron, mean_activation, total_effect_nats and frozen_effect_nats (means of |loss ablated − loss| over
        the n (T − 1) predicted tokens), total_change_nats and frozen_change_nats (means of loss ablated − loss) and
        norm_mediated_share (1 − frozen_effect / total_effect, negative where the norm dampens; NaN without effect).

    Raises:
        InputError: the model is of another kind, the sequences do not fit it, or it lacks a neuron.
    """
    check_decoder(model)
    check_predicting(model, sequences)
    pairs = _chosen_neurons(model, neurons)
    readout = Readout.of(model)
    batches = sequences.to(model.device).split(batch_size)
    means, losses, stds = _unablated(model, readout, batches)
    projections = neuron_projections(model)
    blocks = readers_of_residual_stream(model)
    changes: list[list[torch.Tensor]] = [[] for _ in pairs]
    work = [(number, pair) for number in range(len(batches)) for pair in enumerate(pairs)]
    streams: list[torch.Tensor] = []
    for number, (place, (layer, neuron)) in track(work, "confidence neurons", unit="neurons"):
        batch, loss, std = batches[number], losses[number], stds[number]
        if place == 0:
            streams = read_inputs(model, batch, blocks)

        def ablate(_: int, activations: torch.Tensor, layer: int = layer, neuron: int = neuron) -> torch.Tensor:
            ablated = activations.clone()
            ablated[..., neuron] = means[layer][neuron]
            return ablated

        with starting_at(model, layer, streams[layer]), intercepted([projections[layer]], ablate):
            (final,) = read_inputs(model, batch, blocks[-1:])
        found = [_losses(model, readout, final, each, batch) - loss for each in (readout.std(final), std)]
        changes[place].append(torch.stack(found))
    return pd.DataFrame(
        {
            "layer": layer,
            "neuron": neuron,
            "mean_activation": means[layer][neuron].item(),
            **_effects(*torch.cat(each, dim=1)),
        }
        for (layer, neuron), each in zip(pairs, changes, strict=True)
    )


def _effects(total: torch.Tensor, frozen: torch.Tensor) -> dict[str, float]:
    """The columns of effects, from the change of every predicted token's loss, nats."""
    effect, frozen_effect = total.abs().mean(), frozen.abs().mean()
    return {
        "total_effect_nats": effect.item(),
        "frozen_effect_nats": frozen_effect.item(),
        "total_change_nats": total.mean().item(),
        "frozen_change_nats": frozen.mean().item(),
        "norm_mediated_share": (1 - frozen_effect / effect).item(),
    }


def _chosen_neurons(model: NormfreeForCausalLM, neurons: pd.DataFrame) -> list[tuple[int, int]]:
    if missing := [column for column in ("layer", "neuron") if column not in neurons.columns]:
        raise InputError(f"the frame of neurons lacks {', '.join(missing)}; it needs the columns layer and neuron")
    if neurons.empty:
        raise InputError("there is no neuron to ablate; give at least one")
    n_layer, n_inner = model.config.n_layer, model.config.n_inner
    pairs = [(int(layer), int(neuron)) for layer, neuron in neurons[["layer", "neuron"]].to_numpy()]
    for layer, neuron in pairs:
        if not (0 <= layer < n_layer and 0 <= neuron < n_inner):
            raise InputError(
                f"there is no neuron {neuron} in layer {layer}; the model has the layers 0 to {n_layer - 1} with "
                f"the neurons 0 to {n_inner - 1}"
            )
    return pairs


def _null_space(unembedding: torch.Tensor, n_directions: int | None, is_centred: bool) -> torch.Tensor:
    """The right singular vectors of the smallest singular values, float64 [n_embd, n_directions]."""
    n_embd = unembedding.shape[1]
    n_directions = max(1, ceil(NULL_SPACE_SHARE * n_embd)) if n_directions is None else n_directions
    n_there = n_embd - is_centred
    if not 1 <= n_directions <= n_there:
        raise InputError(f"cannot take {n_directions} null directions of {n_there}; choose 1 to {n_there}")
    gram = unembedding.T @ unembedding
    if not gram.isfinite().all():
        raise InputError("the unembedding of the model holds NaN or Inf, so it has no null space; use another model")
    if is_centred:
        # Moves the direction (1, ..., 1) from the smallest to the largest eigenvalue.
        gram += 2 * gram.trace() / n_embd
    return torch.linalg.eigh(gram).eigenvectors[:, :n_directions]


def _variance_over_rows(unembedding: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The variance over the vocabulary of unembedding @ unit.T, without building it ([vocab_size, n_inner])."""
    centred = unembedding - unembedding.mean(dim=0)
    covariance = centred.T @ centred / len(centred)
    return ((unit @ covariance) * unit).sum(dim=-1)


def _standardized(values: torch.Tensor) -> torch.Tensor:
    """z-scores over the finite values; NaN for the others."""
    finite = values[values.isfinite()]
    return torch.where(values.isfinite(), (values - finite.mean()) / finite.std(correction=0), np.nan)


def _unablated(
    model: NormfreeForCausalLM, readout: Readout, batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Mean activations, float64 [n_inner] a layer; losses [n, T − 1] and stds [n, T, 1] a batch."""
    projections = neuron_projections(model)
    sums = [torch.zeros(model.config.n_inner, dtype=torch.float64, device=model.device) for _ in projections]
    losses, stds = [], []
    for batch in batches:
        *activations, final = read_inputs(model, batch, [*projections, model.model.final_norm])
        for total, each in zip(sums, activations, strict=True):
            total += each.double().sum(dim=(0, 1))
        stds.append(readout.std(final))
        losses.append(_losses(model, readout, final, stds[-1], batch))
    n_tokens = sum(batch.numel() for batch in batches)
    return [total / n_tokens for total in sums], losses, stds


def _losses(
    model: NormfreeForCausalLM, readout: Readout, final: torch.Tensor, std: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Loss of every predicted token, nats, float64 [batch, T − 1], for a given σ of the final norm."""
    hidden = readout.normalized(final, std).to(model.dtype)
    return linear_cross_entropy(hidden, model.lm_head, tokens).losses.double()
