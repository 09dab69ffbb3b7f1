"""The contract of what reads a running model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
import torch.distributed
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.probes.forward_passes import is_backward


class LayerRow(NamedTuple):
    """One value that was read of a layer, as ``layers.parquet`` has it.

    layer: from 0.
    head: from 0; None for a value of the whole layer.
    name: with its unit, such as ``entropy_nats``.
    """

    layer: int
    head: int | None
    name: str
    value: float


class Attachable(ABC):
    """Context manager: attached to a model from entry to exit. It can be entered again.

    Raises:
        InputError: entered while it is attached.
    """

    _attached: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._attached is not None:
            raise InputError(f"this {type(self).__name__} is already active; leave it before entering it again")
        with ExitStack() as stack:
            self._attach(stack)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Detaches from the model; what was seen stays. Safe to call at any time."""
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.close()

    @abstractmethod
    def _attach(self, stack: ExitStack) -> None:
        """Attaches to the model; ``stack`` detaches again."""


class Probe(Attachable):
    """Reads a model while it runs, and leaves what it computes as it is, bit for bit.

    Statistics add up over the forward passes seen while attached, until ``reset``. Recomputation under gradient
    checkpointing is not counted again. ::

        with probe:
            model(batch)
        probe.reduce()
        list(probe.layer_rows())
    """

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything seen."""

    def reduce(self) -> None:
        """Sums the statistics over all processes of torch.distributed, in place; a no-op outside of it.

        Collective: call it from every rank, once, before reading; ``reset`` before measuring again.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._reduce()

    @abstractmethod
    def _reduce(self) -> None: ...

    @abstractmethod
    def layer_rows(self) -> Iterator[LayerRow]:
        """What was seen, as rows."""


class WeightProbe(Probe):
    """Reads parameters, which needs no forward pass: as they are when it is entered."""

    def __init__(self) -> None:
        self._rows: list[LayerRow] = []

    @abstractmethod
    def read(self) -> Iterator[LayerRow]:
        """The parameters as they are now. Collective: call it from every rank."""

    def reset(self) -> None:
        self._rows = []

    def layer_rows(self) -> Iterator[LayerRow]:
        yield from self._rows

    def _attach(self, stack: ExitStack) -> None:
        self._rows = list(self.read())

    def _reduce(self) -> None:
        """Every process has the same parameters."""


def read_calls(stack: ExitStack, module: nn.Module, read: Callable[[Any, Any], None]) -> None:
    """Calls ``read`` with the positional inputs and the output of every call of ``module``, until ``stack`` is closed.

    It runs without gradients, and not in calls that recompute under gradient checkpointing.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not is_backward():
            with torch.no_grad():
                read(inputs, output)

    stack.callback(module.register_forward_hook(hook).remove)


def rows_by_layer(tables: dict[str, Tensor]) -> Iterator[LayerRow]:
    """Rows of values of whole layers, each table [n_layer], by name."""
    for name, values in tables.items():
        for layer, value in enumerate(values.tolist()):
            yield LayerRow(layer, None, name, value)


def rows_by_head(name: str, table: Tensor) -> Iterator[LayerRow]:
    """Rows of values of heads, [n_layer, n_head]."""
    for layer, heads in enumerate(table.tolist()):
        for head, value in enumerate(heads):
            yield LayerRow(layer, head, name, value)
