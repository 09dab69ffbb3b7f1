"""Signal propagation through a finished model, and its outliers: one row of statistics a layer."""

from __future__ import annotations

import pandas as pd
import torch
from transformers import PreTrainedModel

from normfree.errors import InputError
from normfree.probes.residual_stream import ResidualStreamProbe


@torch.no_grad()
def measure_signal_propagation(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8) -> pd.DataFrame:
    """Runs ``model`` over ``sequences`` (int64 [n, T], no padding) under a :class:`ResidualStreamProbe`.

    Works on transformers decoders whose blocks can be found (see
    :func:`~normfree.modeling.decoder_blocks.decoder_blocks`). The model stays in the mode it is in; its head on top of
    the last layer is not computed. The statistics are of the residual stream after the block, before any final norm.

    Returns:
        layer (from 0), module, residual_rms, residual_kurtosis, residual_excess_kurtosis, residual_max_over_median,
        token_cosine_similarity (float64; see the probe's methods of these names), residual_nan_count,
        residual_inf_count and tokens (int64). A row a layer; where a layer holds NaN or Inf, its statistics do.

    Raises:
        InputError: there is no sequence of two tokens, the model has no list of decoder blocks, or a block puts out
            something else than activations.
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
