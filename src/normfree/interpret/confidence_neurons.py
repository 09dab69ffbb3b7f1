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
    neuron_projections,
)
from normfree.interpret.readout import Readout
from normfree.modeling import NormfreeForCausalLM

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
