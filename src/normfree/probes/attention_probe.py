"""What probes of attention share: layers that attend, which of them were read, and tables of their heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.probes.measuring import Parts
from normfree.probes.probe import Probe
from normfree.probes.reading import UnreadableCallError
from normfree.probes.watching import Attending, AttentionWatch, Row

Seen = TypeVar("Seen")
"""What is kept of one layer."""


class AttentionProbe(Probe, Generic[Seen]):
    """Reads queries, keys and mask of every attention of a transformers model; see :class:`EntropyProbe` for what
    is a layer, and what is read.

    Nothing is attached to the model, and no error reaches it: an error is the reason in ``unreadable``.

    Raises:
        InputError: nothing in the model attends.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watch = AttentionWatch(model, self._read_guarded)
        self._parts = Parts()
        self.reset()

    def reset(self) -> None:
        self._watch.reset()
        self._seen: dict[Row, Seen] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the attentions: the first dim of every result."""
        return tuple(self._watch.name(row) for row in self._watch.rows)

    @property
    def unreadable(self) -> dict[str, str]:
        """The attentions that could not be read since the last ``reset``, and why."""
        reasons = {}
        for row in self._watch.rows:
            if row in self._watch.refused:
                reasons[self._watch.name(row)] = self._watch.refused[row]
            elif row not in self._seen:
                reasons[self._watch.name(row)] = self._watch.why_unseen(row)
        return reasons

    @abstractmethod
    def _read(self, row: Row, attending: Attending) -> None:
        """Adds one attention to ``_seen``; an error makes its layer unreadable."""

    @abstractmethod
    def _shape(self, seen: Seen) -> tuple[int, ...]:
        """The sizes of what is kept of a layer, the number of heads first."""

    @abstractmethod
    def _reduce_layer(self, seen: Seen | None, shape: tuple[int, ...], device: torch.device) -> Seen:
        """What all processes have seen of a layer, from what this one has; ``shape`` is the largest of any."""

    def _attach(self, stack: ExitStack) -> None:
        stack.callback(self._parts.forget_mask)
        stack.enter_context(self._watch.watch())

    def _read_guarded(self, row: Row, attending: Attending) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._read(row, attending)

    def _check_heads(self, seen: Seen, n_head: int) -> None:
        before = self._shape(seen)[0]
        if before != n_head:
            raise UnreadableCallError(f"it had {before} heads in one call and {n_head} in another")

    def _reduce(self) -> None:
        shapes = {row: self._shape(seen) for row, seen in self._seen.items()}
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (shapes, self._watch.refused))
        for _, refused in found:
            self._watch.refused |= refused
        self._watch.add({row for shapes, refused in found for row in (*shapes, *refused)})
        for row in self._watch.rows:
            of_all = [shapes[row] for shapes, _ in found if row in shapes]
            if of_all and row not in self._watch.refused:
                shape = tuple(max(each) for each in zip(*of_all, strict=True))
                device = next((each.device for each in self._watch.module(row).parameters()), torch.device("cpu"))
                self._seen[row] = self._reduce_layer(self._seen.get(row), shape, device)

    def _readable(self) -> dict[Row, Seen]:
        return {row: each for row, each in self._seen.items() if row not in self._watch.refused}

    def _stack(self, result: Callable[[Seen], Tensor], empty: float = torch.nan) -> Tensor:
        """One result a layer, stacked on the CPU; layers that were not read are filled with ``empty``.

        Raises:
            InputError: no layer could be read, or the layers differ in their number of heads.
        """
        results = {row: result(layer).cpu() for row, layer in self._readable().items()}
        if not results:
            reasons = "; ".join(sorted(set(self.unreadable.values())))
            raise InputError(f"no attention layer of the model has been read: {reasons}")
        shapes = {each.shape for each in results.values()}
        if len(shapes) > 1:
            raise InputError("the layers of this model differ in their number of heads: no common table of heads")
        missing = torch.full_like(next(iter(results.values())), empty)
        return torch.stack([results.get(row, missing) for row in self._watch.rows])
