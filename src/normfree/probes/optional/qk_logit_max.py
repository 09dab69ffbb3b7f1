"""The largest attention logit of every head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor

from normfree.entropy.reference import block_scores
from normfree.entropy.scoring import Scoring
from normfree.entropy.visibility import Block
from normfree.probes.attention_probe import AttentionProbe
from normfree.probes.measuring import Part
from normfree.probes.probe import LayerRow, rows_by_head
from normfree.probes.reading import UnreadableCallError
from normfree.probes.watching import Attending, Row

QK_LOGIT_MAX = "qk_logit_max"


class QKLogitMaxProbe(AttentionProbe[Tensor]):
    """``qk_logit_max`` of each head: the largest logit that entered its softmax, over all queries and visible keys.

    A logit is scale · q·k, soft-capped where the model does so, plus its position bias; padding, hidden keys and
    learned sinks do not count. It is computed in float32 (float64 for float64), in blocks of query rows: the T×T matrix
    is never built.

    Large logits make attention one-hot, which QK normalization prevents (Dehghani et al., "Scaling Vision Transformers
    to 22 Billion Parameters", 2023, Section 2; Wortsman et al., "Small-scale proxies for large-scale Transformer
    training instabilities", 2023, Section 3.1.1).
    """

    def per_head(self) -> Tensor:
        """float32 [n_layer, n_head]; NaN for a head with a NaN logit, and for layers that were not read.

        Raises:
            InputError: no layer could be read, or the layers differ in their number of heads.
        """
        return self._stack(lambda layer: layer).float()

    def layer_rows(self) -> Iterator[LayerRow]:
        return rows_by_head(QK_LOGIT_MAX, self.per_head())

    def _read(self, row: Row, attending: Attending) -> None:
        for part in self._parts.of(attending):
            largest = _largest_logit(part)
            if row in self._seen:
                self._check_heads(self._seen[row], len(largest))
                largest = torch.maximum(self._seen[row], largest)
            self._seen[row] = largest

    def _shape(self, seen: Tensor) -> tuple[int, ...]:
        return tuple(seen.shape)

    def _reduce_layer(self, seen: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        mine = torch.full(shape, -torch.inf, dtype=torch.float64, device=device) if seen is None else seen
        everyones = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyones, mine)
        # ReduceOp.MAX does not keep NaN on every backend
        return torch.stack(everyones).amax(0)


def _largest_logit(part: Part) -> Tensor:
    """float64 [n_head]; -inf for a head whose queries see no key."""
    valid = part.queries.valid[:, None, :, None]
    largest = [
        logits.masked_fill(~valid[:, :, block.rows], -torch.inf).amax((0, 2, 3)) for block, logits in _blocks(part)
    ]
    return torch.stack(largest).amax(0).double()


def _blocks(part: Part) -> Iterator[tuple[Block, Tensor]]:
    """Logits [batch, n_head, rows, columns] of some query rows at a time, -inf at hidden keys."""
    attention, visibility = part.attention, part.visibility
    if attention is None:
        assert part.scores is not None
        for block in visibility.blocks(part.scores[:, :, 0].numel()):
            assert block.allowed is not None
            yield block, part.scores[:, :, block.rows].masked_fill(~block.allowed, -torch.inf)
        return
    if attention.selects:
        raise UnreadableCallError("it attends to selected keys, and which ones is not known")
    wide = torch.promote_types(torch.promote_types(attention.q.dtype, attention.k.dtype), torch.float32)
    q, k, scoring = attention.q.to(wide), attention.k.to(wide), Scoring(attention.scale, attention.softcap)
    with torch.autocast(q.device.type, enabled=False):
        for block in visibility.blocks(q.shape[0] * q.shape[1] * visibility.n_key):
            yield block, block_scores(q, k, scoring, block)


PROBE = QKLogitMaxProbe
