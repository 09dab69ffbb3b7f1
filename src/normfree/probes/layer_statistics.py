"""Running sums over the queries of one attention layer, in float64, on the layer's device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from normfree.entropy import compiled_kernels
from normfree.entropy.nonfinite_scores import NonFiniteCount

SINK_THRESHOLD = 0.3
"""Attention to the first key above which a query, or a head on average, has a sink (Gu et al., "When Attention Sink
Emerges", 2024)."""


@dataclass(frozen=True)
class Queries:
    """The queries of an attention call, at positions ``start`` and up; layers with one mask share them.

    valid: bool [batch, n_query], the queries that count.
    counts: int64, broadcastable to [batch, n_head, n_query]: visible keys of each, a learned sink included.
    """

    start: int
    valid: Tensor
    counts: Tensor

    @cached_property
    def all_valid(self) -> bool:
        return bool(self.valid.all())

    @cached_property
    def n_valid(self) -> Tensor:
        """int64 []"""
        return self.valid.sum()

    @cached_property
    def rows(self) -> Tensor:
        """Valid queries at each position: int64 [n_query]."""
        return self.valid.sum(0)

    @cached_property
    def bound(self) -> Tensor:
        """Σ ln(number of visible keys) of the valid queries at each position: float64 [n_head or 1, n_query]."""
        return self.counts.double().log().where(self.valid[:, None], 0.0).sum(0)


@dataclass
class LayerStatistics:
    """Sums over batches and sequences, entropies in nats; T is one more than the last query position seen.

    Sums leave NaN rows out; ``nan_rows`` counts them.
    """

    rows: Tensor
    """int64 [T]: queries seen at each position, those with NaN entropy included."""
    nan_rows: Tensor
    """int64 [n_head, T]"""
    entropy: Tensor
    """float64 [n_head, T]"""
    bound: Tensor
    """float64 [n_head, T]: sum over all rows of ln(number of visible keys)."""
    sink: Tensor
    """float64 [n_head]: sum of the attention paid to the first key."""
    sink_queries: Tensor
    """int64 [n_head]: queries that pay more than ``SINK_THRESHOLD`` to the first key."""
    sink_rows: Tensor
    """int64 [1]: queries in ``sink`` and ``sink_queries``."""
    nan_scores: Tensor
    """int64 [n_head]"""
    inf_scores: Tensor
    """int64 [n_head]"""

    @classmethod
    def zeros(cls, n_head: int, n_position: int, device: torch.device) -> LayerStatistics:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            rows=zeros(torch.int64, n_position),
            nan_rows=zeros(torch.int64, n_head, n_position),
            entropy=zeros(torch.float64, n_head, n_position),
            bound=zeros(torch.float64, n_head, n_position),
            sink=zeros(torch.float64, n_head),
            sink_queries=zeros(torch.int64, n_head),
            sink_rows=zeros(torch.int64, 1),
            nan_scores=zeros(torch.int64, n_head),
            inf_scores=zeros(torch.int64, n_head),
        )

    @property
    def n_head(self) -> int:
        return self.nan_rows.shape[0]

    @property
    def n_position(self) -> int:
        return self.rows.shape[0]

    def grow(self, n_position: int) -> None:
        """Makes room for positions below ``n_position``."""
        missing = n_position - self.n_position
        if missing > 0:
            for name in ("rows", "nan_rows", "entropy", "bound"):
                setattr(self, name, pad(getattr(self, name), (0, missing)))

    def add(self, queries: Queries, entropy: Tensor, share: Tensor | None) -> None:
        """Adds queries with their entropy and the attention they pay to the first key, [batch, n_head, n_query] each.

        ``share`` is None for queries that continue a sequence. A query with a NaN counts as a row only.
        """
        self.grow(queries.start + entropy.shape[2])
        if share is not None:
            self.sink_rows += queries.n_valid
            self.sink_queries += ((share > SINK_THRESHOLD) & queries.valid[:, None]).sum((0, 2))
        if not self._add_at_once(queries, entropy, share):
            self._add_one_by_one(queries, entropy, share)

    def _add_at_once(self, queries: Queries, entropy: Tensor, share: Tensor | None) -> bool:
        """Adds by the compiled kernel if there is one, all queries are valid and none is NaN; True if it has."""
        on_cpu = entropy.device.type == "cpu" and entropy.dtype == torch.float32
        if not on_cpu or compiled_kernels.kernels_refuse() is not None or not queries.all_valid:
            return False
        sums = compiled_kernels.QuerySums(self.rows, self.bound, self.entropy, self.sink)
        return compiled_kernels.add_queries(sums, queries.start, entropy, share, queries.rows, queries.bound)

    def _add_one_by_one(self, queries: Queries, entropy: Tensor, share: Tensor | None) -> None:
        positions, valid_rows = slice(queries.start, queries.start + entropy.shape[2]), queries.valid[:, None]
        is_nan = entropy.isnan()
        self.rows[positions] += queries.rows
        self.bound[:, positions] += queries.bound
        self.nan_rows[:, positions] += (is_nan & valid_rows).sum(0)
        self.entropy[:, positions] += entropy.double().where(valid_rows & ~is_nan, 0.0).sum(0)
        if share is not None:
            self.sink += share.double().where(valid_rows & ~share.isnan(), 0.0).sum((0, 2))

    def add_nonfinite(self, count: NonFiniteCount) -> None:
        self.nan_scores += count.nan
        self.inf_scores += count.inf

    def all_reduce(self) -> None:
        """Sums over the processes of torch.distributed, which need equal numbers of heads and positions."""
        for field in fields(self):
            torch.distributed.all_reduce(getattr(self, field.name))
