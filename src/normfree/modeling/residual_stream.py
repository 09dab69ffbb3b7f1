"""Signal propagation and outliers: statistics of the residual stream after each block of any transformers decoder.

They are read from the blocks' outputs, so they need no norm to hook into, and they know nothing of training: telemetry
reads them while a model trains, ``normfree.interpret`` from a finished one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker
from transformers.modeling_layers import GradientCheckpointingLayer

from normfree.errors import InputError
from normfree.modeling import activation_kernels
from normfree.modeling.activation_kernels import StreamSums
from normfree.modeling.attached import Attached
from normfree.modeling.moments import CentralMoments

NEVER_CALLED = "it has not been called"


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks of ``model``, wrapped (DDP, PEFT) or not, by module name, in order.

    They are the one ``nn.ModuleList`` of transformers' ``GradientCheckpointingLayer``, which is what transformers
    makes every decoder block of (``model.layers``, ``transformer.h``, ``gpt_neox.layers``; ours: ``model.blocks``).

    Raises:
        InputError: there is no such list, or more than one, as in an encoder-decoder.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    }
    if len(lists) != 1:
        found = f"has {len(lists)} ({', '.join(lists)})" if lists else "has none"
        raise InputError(
            f"reading the residual stream needs one list of decoder blocks, and {type(model).__name__} {found}; "
            "pass a decoder-only language model of transformers"
        )
    ((name, blocks),) = lists.items()
    return {f"{name}.{layer}": block for layer, block in enumerate(blocks)}


@dataclass(frozen=True)
class StreamStatistics:
    """What is kept of one layer's activations x [n_sequence, T, d]: sums that add up over batches and processes.

    channel_squares: Σ x² over tokens, float64 [d].
    ratios: Σ over tokens of max_j |x_j| / median_j |x_j|, float64 [].
    similarities: Σ over sequences of the mean cosine between two different tokens, float64 [].
    nan, inf: numbers of such entries, int64 [].
    """

    n_sequences: int
    n_tokens: int
    channel_squares: Tensor
    moments: CentralMoments
    ratios: Tensor
    similarities: Tensor
    nan: Tensor
    inf: Tensor

    @classmethod
    def of(cls, x: Tensor) -> StreamStatistics:
        """The statistics of one batch, x [n_sequence, T, d] of any float dtype."""
        n_sequences, T, _ = x.shape
        sums = activation_kernels.stream_sums(x) if activation_kernels.kernels_take(x) else _stream_sums(x)
        similarities = (sums.directions - T) / (T * (T - 1) or torch.nan)
        return cls(
            n_sequences,
            n_sequences * T,
            sums.channel_squares,
            CentralMoments(x.numel(), *sums.moments),
            max_over_median(x).sum(),
            similarities.sum(),
            *sums.nonfinite,
        )

    def __add__(self, other: StreamStatistics) -> StreamStatistics:
        return StreamStatistics(
            self.n_sequences + other.n_sequences,
            self.n_tokens + other.n_tokens,
            self.channel_squares + other.channel_squares,
            self.moments + other.moments,
            self.ratios + other.ratios,
            self.similarities + other.similarities,
            self.nan + other.nan,
            self.inf + other.inf,
        )

    def packed(self) -> Tensor:
        """All of it in one float64 [d + 11]; counts are exact up to 2⁵³."""
        counts = self.channel_squares.new_tensor([self.n_sequences, self.n_tokens])
        sums = torch.stack([self.ratios, self.similarities, self.nan.double(), self.inf.double()])
        return torch.cat([counts, sums, self.moments.packed(), self.channel_squares])

    @classmethod
    def unpacked(cls, packed: Tensor) -> StreamStatistics:
        """The inverse of :meth:`packed`."""
        n_sequences, n_tokens, ratios, similarities, nan, inf = packed[:6]
        return cls(
            int(n_sequences),
            int(n_tokens),
            packed[11:],
            CentralMoments.unpacked(packed[6:11]),
            ratios,
            similarities,
            nan.long(),
            inf.long(),
        )


def _stream_sums(x: Tensor) -> StreamSums:
    # Fourth powers of all finite float32 numbers are finite in float64.
    x64 = x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    squares = x64.square()
    inverse_norm = squares.sum(dim=-1, keepdim=True).rsqrt()
    directions = (inverse_norm.transpose(1, 2) @ x64).squeeze(1).square().sum(dim=-1)
    nonfinite = torch.stack([x.isnan().sum(), x.isinf().sum()])
    channel_squares = squares.sum(dim=(0, 1))
    moments = CentralMoments.of(x64, scratch=squares)
    return StreamSums(channel_squares, directions, moments.packed()[1:], nonfinite)


def max_over_median(x: Tensor) -> Tensor:
    """The largest over the median absolute entry of the last dimension, float64; for a NaN among them, any number.

    Of an even number of entries the median is the lower of the two in the middle.
    """
    magnitudes = x.abs()
    if x.device.type != "cpu":
        return magnitudes.amax(dim=-1).double() / magnitudes.median(dim=-1).values.double()
    # NumPy's vectorized sort takes a fifteenth of the time of torch's on a CPU, and less than its own selection.
    values = (magnitudes.float() if x.dtype == torch.bfloat16 else magnitudes).numpy()
    values.sort(axis=-1)
    ordered = torch.from_numpy(values)
    return ordered[..., -1].double() / ordered[..., (x.shape[-1] - 1) // 2].double()


class ResidualStreamProbe(Attached):
    """Statistics of the residual stream after each block, over the batches seen while attached.

    It attaches itself when it is made and leaves with :meth:`close` or at the end of a ``with`` block::

        with ResidualStreamProbe(model) as probe:
            for batch in batches:
                model(batch)
        probe.by_layer()

    Activations are read in their own precision, computed with in float64, and not kept. X is what a block put out over
    all N tokens seen, [N, d]; every position counts, so sequences must not be padded. Recomputation under gradient
    checkpointing is not counted again.

    NaN and infinite entries are counted, and make every statistic they enter NaN or infinite; none is left out. So do
    tokens whose channels are half zeros (``max_over_median``) or all zeros (also the cosine similarity), and sequences
    of one token (the cosine similarity).

    Raises:
        InputError: the model has no list of decoder blocks (see :func:`decoder_blocks`).
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = decoder_blocks(model)
        self.layers = tuple(blocks)
        self._statistics: list[StreamStatistics | None] = [None] * len(blocks)
        self._refused: dict[int, str] = {}
        self._tracker = ModuleTracker()
        self._hooks = [block.register_forward_hook(self._reader(layer)) for layer, block in enumerate(blocks.values())]

    def close(self) -> None:
        """Takes the probe off the model; what it has seen stays."""
        for hook in self._hooks:
            hook.remove()

    @property
    def unreadable(self) -> dict[str, str]:
        """The blocks that have not been read, by name, and why; their statistics are NaN, their counts 0."""
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
        return self._count(lambda each: torch.tensor(each.moments.n))

    @property
    def tokens(self) -> Tensor:
        """Tokens seen, int64 [n_layer]."""
        return self._count(lambda each: torch.tensor(each.n_tokens))

    @property
    def nan(self) -> Tensor:
        """NaN entries, int64 [n_layer]."""
        return self._count(lambda each: each.nan)

    @property
    def inf(self) -> Tensor:
        """Infinite entries, int64 [n_layer]."""
        return self._count(lambda each: each.inf)

    def rms(self) -> Tensor:
        """Root mean square of all entries, sqrt(Σ_αj X_αj² / (N d)): float64 [n_layer]."""
        return self._stack(lambda each: (each.channel_squares.sum() / each.moments.n).sqrt())

    def kurtosis(self) -> Tensor:
        """Kurtosis of the channels' RMS, the measure of outlier features of He et al. (2024): float64 [n_layer].

        With s_j = sqrt(Σ_α X_αj² / N), it is (Σ_j s_j⁴ / d) / (Σ_j s_j² / d)²: 1 where all channels are equally
        large, d where one channel holds everything (He et al., "Understanding and Minimising Outlier Features in
        Transformer Training", 2024, Section 2).
        """
        return self._stack(lambda each: each.channel_squares.square().mean() / each.channel_squares.mean().square())

    def excess_kurtosis(self) -> Tensor:
        """Excess kurtosis of all entries pooled, E[(x − μ)⁴] / E[(x − μ)²]² − 3: float64 [n_layer].

        0 for a normal distribution (Bondarenko et al., "Quantizable Transformers", 2023, report the kurtosis of the
        entries, without − 3). Unlike :meth:`kurtosis` it also sees single large tokens.
        """
        return self._stack(lambda each: each.moments.excess_kurtosis())

    def max_over_median(self) -> Tensor:
        """Mean over tokens α of max_j |X_αj| / median_j |X_αj|, He et al.'s max-median ratio: float64 [n_layer].

        A mean of ratios within a token, so it is exact over a stream. Of an even number of channels the median is the
        lower of the two in the middle.
        """
        return self._stack(lambda each: each.ratios / each.n_tokens)

    def token_cosine_similarity(self) -> Tensor:
        """Mean cosine between the representations of two different tokens of a sequence: float64 [n_layer].

        1 means that all tokens have collapsed onto one direction. With unit vectors u_t of the T tokens, the mean over
        pairs is (|Σ_t u_t|² − T) / (T (T − 1)), the mean off-diagonal entry of their Gram matrix, which is never
        built; then the mean over sequences (Noci et al., "Signal Propagation in Transformers", 2022, Section 3.1).
        """
        return self._stack(lambda each: each.similarities / each.n_sequences)

    def by_layer(self) -> dict[str, Tensor]:
        """Every statistic by the name it is recorded under, each [n_layer]."""
        return {
            "residual_rms": self.rms(),
            "residual_kurtosis": self.kurtosis(),
            "residual_excess_kurtosis": self.excess_kurtosis(),
            "residual_max_over_median": self.max_over_median(),
            "token_cosine_similarity": self.token_cosine_similarity(),
            "residual_nan_count": self.nan,
            "residual_inf_count": self.inf,
        }

    def reduce(self) -> None:
        """Adds up the processes of a distributed run; call it in each of them, once, before reading."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        for layer, seen in enumerate(self._statistics):
            if seen is not None:
                mine = seen.packed()
                everyones = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(everyones, mine)
                first, *others = (StreamStatistics.unpacked(each) for each in everyones)
                self._statistics[layer] = sum(others, first)

    def _reader(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        @torch.no_grad()
        def read(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._tracker.is_bw:
                return
            x = output[0] if isinstance(output, tuple) else output
            if not isinstance(x, Tensor) or x.ndim != 3:
                what = f"a tensor of {x.ndim} dimensions" if isinstance(x, Tensor) else type(x).__name__
                self._refused[layer] = f"it puts out {what}, not activations [n_sequence, T, d]"
                return
            seen, new = self._statistics[layer], StreamStatistics.of(x)
            self._statistics[layer] = new if seen is None else seen + new

        return read

    def _stack(self, statistic: Callable[[StreamStatistics], Tensor]) -> Tensor:
        missing = torch.tensor(torch.nan, dtype=torch.float64)
        return torch.stack([missing if each is None else statistic(each).cpu() for each in self._statistics])

    def _count(self, count: Callable[[StreamStatistics], Tensor]) -> Tensor:
        return torch.stack([torch.tensor(0) if each is None else count(each).cpu() for each in self._statistics])
