"""Running sums over the queries of one attention layer, in float64, on the layer's own device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from normfree.entropy.nonfinite import NonFiniteCount


@dataclass
class LayerStatistics:
    """Sums over batches and sequences; T is one more than the last query position seen so far.

    Entropies are in nats. Sums leave NaN rows out, and ``nan_rows`` says how many there were.
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
    sink_rows: Tensor
    """int64 [1]: queries in ``sink``."""
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
        """Make room for positions below ``n_position``."""
        missing = n_position - self.n_position
        if missing > 0:
            for name in ("rows", "nan_rows", "entropy", "bound"):
                setattr(self, name, pad(getattr(self, name), (0, missing)))

    def add_entropy(self, start: int, entropy: Tensor, counts: Tensor, valid: Tensor) -> None:
        """Add queries at positions ``start`` and up.

        ``entropy`` float32 [batch, n_head, n_query]; ``counts`` int64, the visible keys, broadcastable to it;
        ``valid`` bool [batch, n_query], the queries to count.
        """
        self.grow(start + entropy.shape[2])
        positions = slice(start, start + entropy.shape[2])
        valid_rows = valid[:, None]
        self.rows[positions] += valid.sum(0)
        self.bound[:, positions] += counts.double().log().where(valid_rows, 0.0).sum(0)
        total = _sum_of_all(entropy, valid, 0)
        if total is None:
            is_nan = entropy.isnan()
            self.nan_rows[:, positions] += (is_nan & valid_rows).sum(0)
            total = entropy.double().where(valid_rows & ~is_nan, 0.0).sum(0)
        self.entropy[:, positions] += total

    def add_sink(self, share: Tensor, valid: Tensor) -> None:
        """Add the shares [batch, n_head, n_query] of queries of whole sequences; NaN shares count as rows
        alone.
        """
        total = _sum_of_all(share, valid, (0, 2))
        if total is None:
            total = share.double().where(valid[:, None] & ~share.isnan(), 0.0).sum((0, 2))
        self.sink += total
        self.sink_rows += valid.sum()

    def add_nonfinite(self, count: NonFiniteCount) -> None:
        self.nan_scores += count.nan
        self.inf_scores += count.inf

    def all_reduce(self) -> None:
        """Sum over the processes of torch.distributed; all must have the same numbers of heads and
        positions.
        """
        for field in fields(self):
            torch.distributed.all_reduce(getattr(self, field.name))


def _sum_of_all(values: Tensor, valid: Tensor, dim: int | tuple[int, ...]) -> Tensor | None:
    """The float64 sum of ``values`` over ``dim`` where every query counts and no value is NaN; None elsewhere.

    On the CPU alone: elsewhere asking would wait for the device.
    """
    if values.device.type != "cpu" or not valid.all():
        return None
    total = values.sum(dim, dtype=torch.float64)
    return None if total.isnan().any() else total
