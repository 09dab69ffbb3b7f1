"""The peak memory of a call: in a fresh process on the CPU, of torch's allocator on CUDA."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from normfree.timing import Call

MEMORY_RESET = Path("/proc/self/clear_refs")
"""What makes a process's peak memory readable; only Linux has it."""


def peak_in_fresh_process(prepare: Callable[..., Call], *arguments: Any) -> int:
    """Bytes that the call ``prepare(*arguments)`` needs in a process of its own, with as many threads as here.

    ``prepare`` is a function of a module, and warms up what the call uses.

    Raises:
        EOFError: the process was killed, as it is where memory runs out.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    fresh = context.Process(target=_send_peak, args=(sender, torch.get_num_threads(), prepare, *arguments), daemon=True)
    with _deaf_to_ctrl_c():
        fresh.start()
    sender.close()  # or recv() would wait for a process that is gone
    try:
        return int(receiver.recv())
    finally:
        fresh.kill()
        fresh.join()


def _send_peak(peak: Connection, n_thread: int, prepare: Callable[..., Call], *arguments: Any) -> None:
    torch.set_num_threads(n_thread)
    peak.send(peak_here(prepare(*arguments), torch.device("cpu")))


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Meanwhile a process that is started ignores Ctrl-C, which a terminal also sends to it: this one ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def peak_here(call: Call, device: torch.device) -> int:
    """Bytes above what is held now; on the CPU only in a process that has run nothing large before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    MEMORY_RESET.write_text("5")  # resets VmHWM to VmRSS
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or its high-water mark VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
