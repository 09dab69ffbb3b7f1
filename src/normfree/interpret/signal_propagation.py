"""Signal propagation and outliers of a finished model, a row of statistics a layer."""

from __future__ import annotations

import pandas as pd
import torch
from transformers import PreTrainedModel

from normfree.errors import InputError
from normfree.probes.residual_stream import ResidualStreamProbe


@torch.no_grad()
def measure_signal_propagation(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8) -> pd.DataFrame:
    """Runs ``model`` over ``sequences`` (int64 [n, T], no padding) under a :class:`ResidualStreamProbe`.

    The model is a transformers decoder, and keeps its mode; logits are not computed. Statistics are of the residual
    stream after each block, before any final norm.

    Returns:
        layer (from 0), module, residual_rms, residual_kurtosis, residual_excess_kurtosis, residual_max_over_median,
        token_cosine_similarity (float64; see the probe's methods of these names), residual_nan_count,
        residual_inf_count and tokens (int64). A row a layer; NaN and Inf in a layer propagate to its statistics.

    Raises:
        InputError: there is no sequence of two tokens, the model has no list of decoder blocks, or the output of one
            is not activations.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise InputError(f"need token ids [n, T] with n at least 1 and T at least 2, got {list(sequences.shape)}")
    with ResidualStreamProbe(model) as probe:
        for batch in sequences.split(batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    for name, reason in probe.unreadable.items():
        raise InputError(f"the residual stream of {type(model).__name__} cannot be read after {name}: {reason}")
    columns = {name: values.numpy() for name, values in probe.by_layer().items()}
    layers = range(len(probe.layers))
    return pd.DataFrame({"layer": layers, "module": probe.layers, **columns, "tokens": probe.tokens.numpy()})
