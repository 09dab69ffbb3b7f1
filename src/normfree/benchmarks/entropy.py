"""Time and memory of exact attention entropy, against materialised scores and against flash attention alone.

Variants of a length alternate within each round, and ratios are taken per round, which cancels machine drift. Memory is
the peak above what was held before the call, results included: the least of three fresh processes on the CPU, that of
torch's allocator on CUDA. Attention is causal.

    eager                    scores, softmax and p ln p as whole matrices, as from output_attentions=True
    entropy (BACKEND)        normfree.attention_entropy
    attention                torch's scaled_dot_product_attention alone
    attention + entropy      normfree.entropy.attention_and_entropy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from normfree import attention_entropy
from normfree.benchmarks.machine import check_at_least, choose_dtype, milliseconds, surroundings
from normfree.benchmarks.peak_memory import MEMORY_RESET, peak_here, peak_in_fresh_process
from normfree.devices import DTYPES, default_device
from normfree.entropy import BACKENDS, attention_and_entropy, select_backend
from normfree.errors import InputError, RunFailedError
from normfree.timing import Call, interleaved, median_ratio

TOKENS = {"cpu": (128, 512, 1024, 2048, 4096, 8192, 16_384), "cuda": (128, 512, 1024, 2048, 4096, 16_384, 65_536)}
HEADS = {"cpu": 4, "cuda": 16}
EAGER_MATRICES = 4
"""Matrices [batch, n_head, T, T] in float32 that ``eager`` holds at once."""
FRESH_PROCESSES = 3
SMALLEST_PEAK = 2**16
"""Bytes below which memory was reused, so that the peak does not show what the call needs: no ratio is reported."""
WARM_UP_TOKENS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Case:
    """What is the same at every length; sent to fresh processes."""

    batch: int
    heads: int
    head_dim: int
    dtype: str
    eager_gib: float

    def variants(self, n_token: int, device: torch.device) -> dict[str, Call]:
        torch.manual_seed(0)
        shape = (self.batch, self.heads, n_token, self.head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=DTYPES[self.dtype]) for _ in range(3))
        calls: dict[str, Call] = {}
        if EAGER_MATRICES * 4 * q[..., 0].numel() * n_token <= self.eager_gib * 2**30:
            calls["eager"] = partial(_eager_entropy, q, k)
        for backend in _available_backends(device):
            calls[f"entropy ({backend})"] = partial(attention_entropy, q, k, backend=backend)
        calls["attention"] = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
        calls["attention + entropy"] = partial(attention_and_entropy, q, k, v)
        return calls


def benchmark_entropy(
    *,
    tokens: Sequence[int] | None = None,
    batch: int = 1,
    heads: int | None = None,
    head_dim: int = 64,
    dtype: str | None = None,
    rounds: int = 7,
    eager_gib: float = 8.0,
    on_length: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Times every backend at each length, and measures its peak memory.

    Args:
        tokens: the lengths T; None means seven from 128 on, to 16,384 on a CPU and 65,536 on CUDA.
        heads: None means 4 on a CPU and 16 on CUDA.
        dtype: fp32, bf16 or fp16; None means fp32 on a CPU and bf16 on CUDA.
        eager_gib: lengths at which the matrices of ``eager`` would need more run without it.
        on_length: receives the result of each length as soon as it is measured.

    Raises:
        InputError: an option is out of range, or the peak memory of a process cannot be read here.
        RunFailedError: a process whose memory was measured was killed.
    """
    device = default_device()
    lengths = TOKENS[device.type] if tokens is None else tokens
    heads = HEADS[device.type] if heads is None else heads
    case = _Case(batch, heads, head_dim, choose_dtype(dtype, device, DTYPES), eager_gib)
    check_at_least(1, batch=batch, heads=heads, head_dim=head_dim, rounds=rounds, tokens=min(lengths))
    if device.type == "cpu" and not MEMORY_RESET.exists():
        raise InputError(f"a process's peak memory is read by way of {MEMORY_RESET}, which only Linux has")
    result: dict[str, Any] = {
        **surroundings(device),
        "shape": {"batch": batch, "n_head": heads, "head_dim": head_dim},
        "dtype": case.dtype,
        "auto_backend": select_backend(*(torch.zeros(1, 1, 16, 16, device=device) for _ in range(2))),
        "lengths": [],
    }
    for n_token in lengths:
        found = _measured(n_token, case, rounds, device)
        result["lengths"].append(found)
        if on_length is not None:
            on_length(found)
    return result


def _measured(n_token: int, case: _Case, rounds: int, device: torch.device) -> dict[str, Any]:
    calls = case.variants(n_token, device)
    seconds = interleaved(calls, rounds, device)
    peaks = {
        name: peak_here(call, device) if device.type == "cuda" else _peak_in_fresh_processes(name, n_token, case)
        for name, call in calls.items()
    }
    return {
        "tokens": n_token,
        "milliseconds": milliseconds(seconds, 4),
        "peak_mib": {name: round(peak / 2**20, 2) for name, peak in peaks.items()},
        "eager_time_over": {
            name: median_ratio(seconds["eager"], seconds[name]) if "eager" in seconds else None
            for name in calls
            if name.startswith("entropy")
        },
        "eager_memory_over": {
            name: round(peaks["eager"] / peak, 1) if "eager" in peaks and peak >= SMALLEST_PEAK else None
            for name, peak in peaks.items()
            if name.startswith("entropy")
        },
        "attention_and_entropy_over_attention": median_ratio(seconds["attention + entropy"], seconds["attention"]),
    }


def _eager_entropy(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    T = q.shape[2]
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return -torch.special.xlogy(p, p).sum(-1)


def _available_backends(device: torch.device) -> list[str]:
    """All but the reference, which is ``eager`` in float32."""
    q = torch.zeros(1, 1, 16, 16, device=device)
    names = []
    for name in BACKENDS:
        if name == "reference":
            continue
        try:
            attention_entropy(q, q, backend=name)
        except InputError:
            continue
        names.append(name)
    return names


def _peak_in_fresh_processes(name: str, n_token: int, case: _Case) -> int:
    """Bytes that the variant ``name`` needs on the CPU, with as many threads as here.

    A peak also depends on what the allocator happens to reuse; the least is what the call needs.
    """
    return min(_peak_in_fresh_process(name, n_token, case) for _ in range(FRESH_PROCESSES))


def _peak_in_fresh_process(name: str, n_token: int, case: _Case) -> int:
    try:
        return peak_in_fresh_process(_warmed_up, name, n_token, case)
    except EOFError as error:
        raise RunFailedError(
            f"the process that measured the memory of {name!r} at {n_token} tokens was killed, as it is where memory "
            "runs out; give shorter --tokens, or for eager a smaller --eager-gib"
        ) from error


def _warmed_up(name: str, n_token: int, case: _Case) -> Call:
    """A variant, after every variant once at a length that needs next to nothing."""
    for call in case.variants(WARM_UP_TOKENS, CPU).values():
        call()
    return case.variants(n_token, CPU)[name]
