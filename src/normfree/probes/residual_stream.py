"""Signal propagation and outliers: statistics of the residual stream after each block of a transformers decoder.

They are read from the blocks' outputs, so they need no norm to hook into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from normfree.columns import (
    RESIDUAL_EXCESS_KURTOSIS,
    RESIDUAL_INF_COUNT,
    RESIDUAL_KURTOSIS,
    RESIDUAL_MAX_OVER_MEDIAN,
    RESIDUAL_NAN_COUNT,
    RESIDUAL_RMS,
    TOKEN_COSINE_SIMILARITY,
)
from normfree.modeling import activation_kernels
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.probes.moments import CentralMoments
from normfree.probes.probe import LayerRow, Probe, read_calls, rows_by_layer

NEVER_CALLED = "it has not been called"
MOMENTS, CHANNEL_SQUARES = slice(6, 11), slice(11, None)
"""Places in :class:`StreamStatistics`."""


@dataclass(frozen=True)
class StreamStatistics:
    """Sums over a layer's activations x [n_sequence, T, d] that add up over batches and processes.

    packed: all of them, float64 [..., 11 + d], in the order of the properties, which have the shape [...]: [] for one
        layer, [n_layer] for several. Counts are exact up to 2⁵³.
    """

    packed: Tensor

    @classmethod
    def of(cls, x: Tensor) -> StreamStatistics:
        """The statistics of one batch, x [n_sequence, T, d] of any float dtype."""
        if not activation_kernels.kernels_take(x):
            return cls(_stream_sums(x))
        packed = torch.empty(CHANNEL_SQUARES.start + x.shape[-1], dtype=torch.float64)
        activation_kernels.stream_sums(x, packed)
        return cls(packed)

    @property
    def n_sequences(self) -> Tensor:
        return self.packed[..., 0]

    @property
    def n_tokens(self) -> Tensor:
        return self.packed[..., 1]

    @property
    def ratios(self) -> Tensor:
        """Σ over tokens of max_j |x_j| / median_j |x_j| (lower median); any number after a token with a NaN."""
        return self.packed[..., 2]

    @property
    def similarities(self) -> Tensor:
        """Σ over sequences of the mean cosine between two different tokens."""
        return self.packed[..., 3]

    @property
    def nan(self) -> Tensor:
        """Number of NaN entries."""
        return self.packed[..., 4]

    @property
    def inf(self) -> Tensor:
        """Number of infinite entries."""
        return self.packed[..., 5]

    @property
    def moments(self) -> CentralMoments:
        """Central moments of all entries."""
        return CentralMoments.unpacked(self.packed[..., MOMENTS])

    @property
    def channel_squares(self) -> Tensor:
        """Σ x² over tokens, of each channel: [..., d]."""
        return self.packed[..., CHANNEL_SQUARES]

    def __add__(self, other: StreamStatistics) -> StreamStatistics:
        packed = self.packed + other.packed
        packed[..., MOMENTS] = (self.moments + other.moments).packed()
        return StreamStatistics(packed)


def _stream_sums(x: Tensor) -> Tensor:
    n_sequences, T, _ = x.shape
    # Fourth powers of all finite float32 numbers are finite in float64.
    x64 = x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    squares = x64.square()
    inverse_norm = squares.sum(dim=-1, keepdim=True).rsqrt()
    directions = (inverse_norm.transpose(1, 2) @ x64).square().sum()
    similarities = (directions - n_sequences * T) / (T * (T - 1) or torch.nan)
    magnitudes = x.abs()
    ratios = magnitudes.amax(dim=-1).double() / magnitudes.median(dim=-1).values.double()
    channel_squares = squares.sum(dim=(0, 1))
    counts = channel_squares.new_tensor([n_sequences, n_sequences * T])
    sums = torch.stack([ratios.sum(), similarities, x.isnan().sum().double(), x.isinf().sum().double()])
    return torch.cat([counts, sums, CentralMoments.of(x64, scratch=squares).packed(), channel_squares])


class ResidualStreamProbe(Probe):
    """Statistics of the residual stream after each block, over the batches seen while attached. ::

        with ResidualStreamProbe(model) as probe:
            for batch in batches:
                model(batch)
        probe.by_layer()

    Activations are read in their own precision and summed in float64. X [N, d] below is the output of a block for all N
    tokens seen; every position counts, so sequences must not be padded.

    NaN and infinite entries are counted, and make every statistic they enter NaN or infinite. So do tokens whose
    channels are half zeros (``max_over_median``) or all zeros (cosine similarity too), and sequences of one token
    (cosine similarity).

    Raises:
        InputError: the model has no list of decoder blocks (see :func:`decoder_blocks`).
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = decoder_blocks(model)
        self.layers = tuple(blocks)
        self._blocks = tuple(blocks.values())
        self.reset()

    def reset(self) -> None:
        self._statistics: list[StreamStatistics | None] = [None] * len(self._blocks)
        self._stacked: StreamStatistics | None = None
        self._refused: dict[int, str] = {}

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons of the blocks that were not read, by name; their statistics are NaN, their counts 0."""
        reasons = {}
        for layer, name in enumerate(self.layers):
            if layer in self._refused:
                reasons[name] = self._refused[layer]
            elif self._statistics[layer] is None:
                reasons[name] = NEVER_CALLED
        return reasons

    @property
    def elements(self) -> Tensor:
        """Entries seen, int64 [n_layer]."""
        return self._seen().moments.n.long()

    @property
    def tokens(self) -> Tensor:
        """Tokens seen, int64 [n_layer]."""
        return self._seen().n_tokens.long()

    @property
    def nan(self) -> Tensor:
        """NaN entries, int64 [n_layer]."""
        return self._seen().nan.long()

    @property
    def inf(self) -> Tensor:
        """Infinite entries, int64 [n_layer]."""
        return self._seen().inf.long()

    def rms(self) -> Tensor:
        """Root mean square of all entries, sqrt(Σ_αj X_αj² / (N d)): float64 [n_layer]."""
        seen = self._seen()
        return (seen.channel_squares.sum(-1) / seen.moments.n).sqrt()

    def kurtosis(self) -> Tensor:
        """Kurtosis of the channels' RMS, a measure of outlier features: float64 [n_layer].

        With s_j = sqrt(Σ_α X_αj² / N), (Σ_j s_j⁴ / d) / (Σ_j s_j² / d)²: 1 for equally large channels, d for a single
        non-zero one (He et al., "Understanding and Minimising Outlier Features in Transformer Training", 2024,
        Section 2).
        """
        channel_squares = self._seen().channel_squares
        return channel_squares.square().mean(-1) / channel_squares.mean(-1).square()

    def excess_kurtosis(self) -> Tensor:
        """Excess kurtosis of all entries pooled, E[(x − μ)⁴] / E[(x − μ)²]² − 3: float64 [n_layer].

        0 for a normal distribution (Bondarenko et al., "Quantizable Transformers", 2023, report it without − 3).
        Unlike :meth:`kurtosis` it also sees single large tokens.
        """
        return self._seen().moments.excess_kurtosis()

    def max_over_median(self) -> Tensor:
        """Mean over tokens α of max_j |X_αj| / median_j |X_αj|, He et al.'s max-median ratio: float64 [n_layer].

        Exact over a stream, as each ratio is of one token. The median is the lower one for an even number of channels.
        """
        seen = self._seen()
        return seen.ratios / seen.n_tokens

    def token_cosine_similarity(self) -> Tensor:
        """Mean cosine between the representations of two different tokens of a sequence: float64 [n_layer].

        1: all tokens have collapsed onto one direction. With unit vectors u_t of T tokens, the mean over pairs is
        (|Σ_t u_t|² − T) / (T (T − 1)), without the Gram matrix; then the mean over sequences (Noci et al., "Signal
        Propagation in Transformers", 2022, Section 3.1).
        """
        seen = self._seen()
        return seen.similarities / seen.n_sequences

    def by_layer(self) -> dict[str, Tensor]:
        """Every statistic by its recorded name, each [n_layer]."""
        return {
            RESIDUAL_RMS: self.rms(),
            RESIDUAL_KURTOSIS: self.kurtosis(),
            RESIDUAL_EXCESS_KURTOSIS: self.excess_kurtosis(),
            RESIDUAL_MAX_OVER_MEDIAN: self.max_over_median(),
            TOKEN_COSINE_SIMILARITY: self.token_cosine_similarity(),
            RESIDUAL_NAN_COUNT: self.nan,
            RESIDUAL_INF_COUNT: self.inf,
        }

    def layer_rows(self) -> Iterator[LayerRow]:
        return rows_by_layer(self.by_layer())

    def _attach(self, stack: ExitStack) -> None:
        for layer, block in enumerate(self._blocks):
            read_calls(stack, block, partial(self._read, layer))

    def _reduce(self) -> None:
        self._stacked = None
        for layer, seen in enumerate(self._statistics):
            if seen is not None:
                everyones = [torch.empty_like(seen.packed) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(everyones, seen.packed)
                first, *others = map(StreamStatistics, everyones)
                self._statistics[layer] = sum(others, first)

    def _read(self, layer: int, inputs: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor) or x.ndim != 3:
            what = f"a tensor of {x.ndim} dimensions" if isinstance(x, Tensor) else type(x).__name__
            self._refused[layer] = f"it puts out {what}, not activations [n_sequence, T, d]"
            return
        self._stacked = None
        seen, new = self._statistics[layer], StreamStatistics.of(x)
        self._statistics[layer] = new if seen is None else seen + new

    def _seen(self) -> StreamStatistics:
        """Statistics of all layers, [n_layer, 11 + d] on the CPU; zeros for a layer that was not read."""
        if self._stacked is None:
            read = {layer: each.packed.cpu() for layer, each in enumerate(self._statistics) if each is not None}
            size = next((packed.shape for packed in read.values()), (CHANNEL_SQUARES.start + 1,))
            nothing = torch.zeros(size, dtype=torch.float64)
            layers = range(len(self._statistics))
            self._stacked = StreamStatistics(torch.stack([read.get(layer, nothing) for layer in layers]))
        return self._stacked
