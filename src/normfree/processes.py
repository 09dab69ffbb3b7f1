"""The processes that train one run together, as their launcher (torchrun, accelerate) has numbered them.

What only one of them may do, such as writing into the run's folder, the main process does for all; what it decided, or
could not do, becomes known to the others. Without a launcher there is one process, and nothing is sent.
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
"""For what the main process does while the others wait, such as packing a corpus. One that dies is noticed at once."""
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""What torch's communication says of a process at its other end that is no more."""


def n_processes() -> int:
    """Processes that train one model together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """The number of this one among them, from 0: its rank."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the one of them that writes."""
    return process_index() == 0


def speaks() -> bool:
    """Whether this is the one of its machine that reports what all of them are told."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_alone(command: str, instead: str) -> None:
    """Whether this process is the only one of its run, as ``command`` needs it.

    Raises:
        InputError: a launcher has started several.
    """
    if n_processes() > 1:
        raise InputError(f"{command} is one process, and {n_processes()} were started; {instead}")


def on_main(action: Callable[[], Value]) -> Value:
    """What ``action`` returns in the main process, in every process; an error there is an error everywhere.

    All processes have to come here. What is returned is copied to the others.
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
    """Runs ``action`` in the main process, and then in the others, which may find what the first has made."""
    if n_processes() == 1:
        return action()
    mine: list[Value] = []
    on_main(lambda: mine.append(action()))
    return mine[0] if mine else action()


def largest(number: int) -> int:
    """The largest ``number`` of any process; all of them have to come here."""
    if n_processes() == 1:
        return number
    import torch
    import torch.distributed

    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=_group())
    return int(numbers)


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` says that another process of the run is gone."""
    return n_processes() > 1 and any(each in str(error) for each in LOST_CONNECTION)


def _from_main(value: Any) -> Any:
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_group())
    return values[0]


@functools.cache
def _group() -> Any:
    """The processes, connected over the network and not over their devices."""
    import torch
    import torch.distributed
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    return torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
