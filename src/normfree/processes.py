"""The processes that train one run together, numbered by their launcher (torchrun, accelerate).

The main process does for all what only one may do, such as writing into the run's folder; its result or error reaches
the others. Without a launcher there is one process, and nothing is sent.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from normfree.errors import InputError

Value = TypeVar("Value")

LONGEST_WAIT = datetime.timedelta(days=7)
"""Timeout for work that the others wait for, such as packing a corpus. A process that dies is noticed at once."""
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""torch's messages about a peer process that has ended."""


def n_processes() -> int:
    """Number of processes that train one model together (world size)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """True for rank 0, which writes."""
    return process_index() == 0


def speaks() -> bool:
    """True for the process that reports on behalf of its machine (local rank 0)."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_alone(command: str, instead: str) -> None:
    """Checks that ``command`` runs as a single process.

    Raises:
        InputError: a launcher started several.
    """
    if n_processes() > 1:
        raise InputError(f"{command} is one process, and {n_processes()} were started; {instead}")


def on_main(action: Callable[[], Value]) -> Value:
    """Runs ``action`` on rank 0 and returns its result on every rank; an error there is raised on every rank.

    Collective: call from every rank. The result is pickled to the others.
    """
    if n_processes() == 1:
        return action()
    value, error = None, None
    if is_main_process():
        try:
            value = action()
        except Exception as failure:
            error = failure
    outcome = _from_main((value, error))
    if error is not None:
        raise error
    value, error = outcome
    if error is not None:
        raise error
    return value


def main_first(action: Callable[[], Value]) -> Value:
    """Runs ``action`` on rank 0, then on the others, which may find what rank 0 created. Collective."""
    if n_processes() == 1:
        return action()
    mine: list[Value] = []
    on_main(lambda: mine.append(action()))
    return mine[0] if mine else action()


def largest(number: int) -> int:
    """The largest ``number`` over all ranks. Collective: call from every rank."""
    if n_processes() == 1:
        return number
    import torch
    import torch.distributed

    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=_group())
    return int(numbers)


def is_lost_connection(error: BaseException | None) -> bool:
    """True if ``error`` says that another process of the run has ended."""
    return n_processes() > 1 and any(each in str(error) for each in LOST_CONNECTION)


def _from_main(value: Any) -> Any:
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_group())
    return values[0]


@functools.cache
def _group() -> Any:
    """A process group connected over the network, not over devices."""
    import torch
    import torch.distributed
    from accelerate import PartialState

    from normfree.devices import runs_on_cpu

    PartialState(cpu=runs_on_cpu())
    return torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
