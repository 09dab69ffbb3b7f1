"""The attention entropy of every head of a finished model (ReLU's Revival, Figure 1)."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from normfree.columns import ENTROPY_NATS, SHARE_OF_UNIFORM, SINK_QUERY_SHARE, SINK_SHARE, UNIFORM_NATS
from normfree.entropy import entropy_bands
from normfree.files import write_text
from normfree.probes import EntropyProbe
from normfree.progress import track


@dataclass(frozen=True)
class AttentionEntropy:
    """The result of :func:`measure_attention_entropy`.

    heads:
        layer, module, head, entropy_nats, uniform_nats (entropy of uniform attention to the same keys),
        share_of_uniform, sink_share (mean attention to the first token), sink_query_share (share of the queries that
        pay it more than 0.3), nan_queries; a row a head. A head with a NaN query has NaN means.
    layers:
        layer, module, mean_nats, min_nats, max_nats (over the heads), uniform_nats, share_of_uniform, sink_share
        (means over the heads), top_band_heads (heads in the top quarter of the range up to the model's largest head
        entropy: entropic overload in ReLU's Revival), n_head; a row a readable layer.
    unreadable: reasons of the attention modules that could not be read, by name.
    n_sequences, n_tokens: measured on, without padding.
    sequence_length: tokens of the longest sequence.
    uniform_bound: the largest ``uniform_nats`` of a head, given the model's masks and windows; NaN without a readable
        head.
    """

    heads: pd.DataFrame
    layers: pd.DataFrame
    unreadable: dict[str, str]
    n_sequences: int
    n_tokens: int
    sequence_length: int
    uniform_bound: float

    def summary(self) -> dict[str, Any]:
        """All of it, for JSON; NaN becomes null."""
        return {
            "n_sequences": self.n_sequences,
            "n_tokens": self.n_tokens,
            "sequence_length": self.sequence_length,
            "uniform_bound_nats": self.uniform_bound,
            "layers": json.loads(self.layers.to_json(orient="records", double_precision=9)),
            "heads": json.loads(self.heads.to_json(orient="records", double_precision=9)),
            "unreadable": self.unreadable,
        }


def measure_attention_entropy(
    model: nn.Module, sequences: torch.Tensor | Sequence[torch.Tensor], batch_size: int = 8
) -> AttentionEntropy:
    """Runs ``model`` over ``sequences`` under an :class:`~normfree.EntropyProbe`.

    The model runs in evaluation mode, uncompiled and without gradients, and a transformers model without its head;
    modes and torch's random number generators are restored.

    Sequences of different lengths are padded on the right, with an attention mask. If a layer does not separate padding
    from tokens (it ignores the mask, or uses sparse ones), the model runs again on unpadded batches of equal lengths.

    Args:
        model: any module that an :class:`~normfree.EntropyProbe` takes and that is called with ``input_ids``.
        sequences: int64 [n, T], or n tensors, int64 [T_i]; no padding.
        batch_size: sequences in one forward pass.

    Raises:
        InputError: no attention layer of the model can be read.
    """
    rows = list(sequences)
    n_tokens, longest = sum(len(row) for row in rows), max(len(row) for row in rows)
    probe = EntropyProbe(model)
    _watch(probe, model, list(_batches(rows, batch_size)))
    is_padded = any(len(row) < longest for row in rows)
    if is_padded and (probe.unreadable or bool((probe.rows() != n_tokens).any())):
        probe.reset()
        of_length: dict[int, list[torch.Tensor]] = {}
        for row in rows:
            of_length.setdefault(len(row), []).append(row)
        _watch(probe, model, [each for same in of_length.values() for each in _batches(same, batch_size)])
    heads = _heads_frame(probe)
    bound = float(heads[UNIFORM_NATS].max())
    return AttentionEntropy(heads, _layers_frame(heads), probe.unreadable, len(rows), n_tokens, longest, bound)


def write_attention_entropy(result: AttentionEntropy, folder: Path) -> None:
    """Writes ``heads.csv`` and ``layers.csv`` into ``folder``, made if missing; NaN is written as nan."""
    write_text(folder / "heads.csv", result.heads.to_csv(index=False, na_rep="nan"))
    write_text(folder / "layers.csv", result.layers.to_csv(index=False, na_rep="nan"))


def _batches(rows: Sequence[torch.Tensor], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Token ids [n, T] and attention mask [n, T], or None without padding; sequences are sorted by length."""
    by_length = sorted(rows, key=len, reverse=True)
    for start in range(0, len(rows), batch_size):
        batch = by_length[start : start + batch_size]
        tokens = pad_sequence(list(batch), batch_first=True)
        lengths = torch.tensor([len(row) for row in batch])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        yield tokens, (None if bool(mask.all()) else mask)


def _watch(probe: EntropyProbe, model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    # Without the head: logits cost memory, and nobody reads them.
    called = model.base_model if isinstance(model, PreTrainedModel) else model
    parameters = inspect.signature(called.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    with evaluating(model), probe:
        for tokens, mask in track(batches, "attention entropy", unit="batches"):
            options: dict[str, Any] = {"use_cache": False}
            if mask is not None:
                options["attention_mask"] = mask.to(device)
            taken = {name: value for name, value in options.items() if takes_any or name in parameters}
            called(input_ids=tokens.to(device), **taken)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While active, ``model`` is in evaluation mode, uncompiled and without gradients.

    Restores every module's mode and the states of torch's random number generators on exit.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _heads_frame(probe: EntropyProbe) -> pd.DataFrame:
    columns = {
        ENTROPY_NATS: probe.per_head(),
        UNIFORM_NATS: probe.maximum(),
        SHARE_OF_UNIFORM: probe.normalized(),
        SINK_SHARE: probe.sink_share(),
        SINK_QUERY_SHARE: probe.sink_query_share(),
        "nan_queries": probe.nan_rows(),
    }
    layers, heads = np.indices(columns[ENTROPY_NATS].shape)
    modules = np.asarray(probe.layers, dtype=object)[layers.ravel()]
    frame = pd.DataFrame({"layer": layers.ravel(), "module": modules, "head": heads.ravel()})
    for name, table in columns.items():
        frame[name] = (table.double() if table.is_floating_point() else table).numpy().ravel()
    return frame[~frame["module"].isin(probe.unreadable)].reset_index(drop=True)


def _layers_frame(heads: pd.DataFrame) -> pd.DataFrame:
    largest = float(heads[ENTROPY_NATS].max())
    rows = []
    for (layer, module), each in heads.groupby(["layer", "module"], sort=True):
        entropy = each[ENTROPY_NATS].to_numpy(dtype=np.float64)
        # Heads that all attend to one key, or are all NaN, have no range to divide.
        top_band = entropy_bands(entropy, largest)[3] if largest > 0 else 0.0
        rows.append(
            {
                "layer": layer,
                "module": module,
                "mean_nats": entropy.mean(),
                "min_nats": entropy.min(),
                "max_nats": entropy.max(),
                **{name: each[name].mean(skipna=False) for name in (UNIFORM_NATS, SHARE_OF_UNIFORM, SINK_SHARE)},
                "top_band_heads": round(top_band * len(each)),
                "n_head": len(each),
            }
        )
    return pd.DataFrame(rows)
