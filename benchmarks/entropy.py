"""Time and memory of exact attention entropy, against materialised scores and against flash attention alone.

    python benchmarks/entropy.py --out benchmarks/results/entropy-cpu.json
    python benchmarks/entropy.py --tokens 512 4096 --rounds 3

All variants of a length run in one process, in rounds: each round runs every variant once, in a new random order,
and ratios are taken within a round, so that a machine that slows down slows down all. Memory is the peak above what
was held before the call, results included: the least of three fresh processes on the CPU, of torch's allocator on CUDA.
Attention is causal. Prints JSON, length by length; writes all of it with --out.

    eager                    scores, softmax and p ln p as whole matrices, as from output_attentions=True
    entropy (BACKEND)        normfree.attention_entropy
    attention                torch's scaled_dot_product_attention alone
    attention + entropy      normfree.entropy.attention_and_entropy

Lengths at which the matrices of ``eager`` would need more than --eager-gib are run without it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from normfree import attention_entropy
from normfree.entropy import BACKENDS, attention_and_entropy, select_backend
from normfree.errors import InputError
from normfree.timing import Call, interleaved, median_ratio

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = {"cpu": (128, 512, 1024, 2048, 4096, 8192, 16_384), "cuda": (128, 512, 1024, 2048, 4096, 16_384, 65_536)}
EAGER_MATRICES = 4
"""Matrices [batch, n_head, T, T] in float32 that ``eager`` holds at once."""


def eager_entropy(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    T = q.shape[2]
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return -torch.special.xlogy(p, p).sum(-1)


def variants(n_token: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Call]:
    torch.manual_seed(0)
    shape = (arguments.batch, arguments.heads, n_token, arguments.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=DTYPES[arguments.dtype]) for _ in range(3))
    calls: dict[str, Call] = {}
    if EAGER_MATRICES * 4 * q[..., 0].numel() * n_token <= arguments.eager_gib * 2**30:
        calls["eager"] = partial(eager_entropy, q, k)
    for backend in available_backends(device):
        calls[f"entropy ({backend})"] = partial(attention_entropy, q, k, backend=backend)
    calls["attention"] = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    calls["attention + entropy"] = partial(attention_and_entropy, q, k, v)
    return calls


def available_backends(device: torch.device) -> list[str]:
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


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or its high-water mark VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_here(call: Call, device: torch.device) -> int:
    """Bytes above what is held now; on the CPU only in a process that has not run anything large before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = status_bytes("VmRSS")
    result = call()
    peak = status_bytes("VmHWM") - before
    del result
    return peak


def peak_bytes(name: str, n_token: int, call: Call, device: torch.device) -> int:
    if device.type == "cuda":
        return peak_here(call, device)
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name, "--tokens", str(n_token)]
    # What a process holds also depends on what its allocator happens to reuse; the least is what the call needs.
    return min(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3))


def measured(n_token: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    calls = variants(n_token, arguments, device)
    seconds = interleaved(calls, arguments.rounds, device)
    peaks = {name: peak_bytes(name, n_token, call, device) for name, call in calls.items()}
    return {
        "tokens": n_token,
        "milliseconds": {name: round(1000 * statistics.median(each), 4) for name, each in seconds.items()},
        "peak_mib": {name: round(peak / 2**20, 2) for name, peak in peaks.items()},
        "eager_time_over": {
            name: median_ratio(seconds["eager"], seconds[name]) if "eager" in seconds else None
            for name in calls
            if name.startswith("entropy")
        },
        "eager_memory_over": {
            name: round(peaks["eager"] / max(peak, 1), 1) if "eager" in peaks else None
            for name, peak in peaks.items()
            if name.startswith("entropy")
        },
        "attention_and_entropy_over_attention": median_ratio(seconds["attention + entropy"], seconds["attention"]),
    }


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS[device.type])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4 if device.type == "cpu" else 16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32" if device.type == "cpu" else "bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager-gib", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one variant at one length, in its own process
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        for call in variants(16, arguments, device).values():
            call()
        print(peak_here(variants(arguments.tokens[0], arguments, device)[arguments.memory_of], device))
        return

    result = {
        "command": " ".join(["python benchmarks/entropy.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"batch": arguments.batch, "n_head": arguments.heads, "head_dim": arguments.head_dim},
        "dtype": arguments.dtype,
        "auto_backend": select_backend(*(torch.zeros(1, 1, 16, 16, device=device) for _ in range(2))),
        "lengths": [],
    }
    for n_token in arguments.tokens:
        row = measured(n_token, arguments, device)
        result["lengths"].append(row)
        print(json.dumps(row, indent=2), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
