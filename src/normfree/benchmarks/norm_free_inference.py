"""Prefill and decode of a model without norms, against the LayerNorm model it was made from.

GPT-2's shape with random weights; the norms' stds are 1 and folded with ``normfree.remove_norms``, which changes the
output and not the cost. Variants alternate within each round, and ratios are taken per round. One CPU thread is timed
by processor time, several by wall-clock time, which needs an idle machine.

    prefill     one pass over the prompt, last logits only
    decode      one more token after the prompt in the KV cache

The norms' share of the LayerNorm model's time says what their removal can gain. It is taken inside the model: weights
that stream through the caches make a norm 2 to 4 times as slow as one that is called alone. On a CPU and in eager mode
only: a GPU runs behind the calls, and a compiler fuses norms with the operations around them.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from normfree import NormfreeConfig, NormfreeForCausalLM, remove_norms
from normfree.benchmarks.machine import (
    check_at_least,
    choose_dtype,
    clock_of,
    milliseconds,
    surroundings,
)
from normfree.devices import DTYPES, default_device
from normfree.timing import Call, interleaved, median_ratio

NORM, NORM_FREE = "LayerNorm", "norm-free"
STEPS = ("prefill", "decode")
NORM_CALLS = 20
HEAD_DIM = 64


def benchmark_norm_free_inference(
    *,
    layers: int = 12,
    heads: int = 12,
    tokens: int = 256,
    batch: int = 1,
    vocabulary: int = 50257,
    dtype: str | None = None,
    compiled: bool = False,
    rounds: int = 15,
) -> dict[str, Any]:
    """Times both models; ``heads`` are of 64 dimensions, ``dtype`` is fp32 or bf16.

    Raises:
        InputError: an option is out of range.
    """
    device = default_device()
    dtype = choose_dtype(dtype, device)
    shape = {"layers": layers, "heads": heads, "tokens": tokens, "batch": batch, "vocabulary": vocabulary}
    check_at_least(1, **shape, rounds=rounds)
    models = {
        name: model.eval().to(device, DTYPES[dtype])
        for name, model in _models(layers, heads, tokens, vocabulary).items()
    }
    variants = {
        f"{what}, {name}": call
        for name, model in models.items()
        for what, call in _calls(model, batch, tokens, compiled).items()
    }
    seconds = interleaved(variants, rounds, device, clock_of(device))
    return {
        **surroundings(device),
        "shape": shape,
        "dtype": dtype,
        "compiled": compiled,
        "milliseconds": milliseconds(seconds),
        "layernorm_time_over_norm_free": {
            what: median_ratio(seconds[f"{what}, {NORM}"], seconds[f"{what}, {NORM_FREE}"]) for what in STEPS
        },
        "norms_share_of_layernorm_time": {
            what: round(
                _seconds_in_norms(models[NORM], variants[f"{what}, {NORM}"])
                / statistics.median(seconds[f"{what}, {NORM}"]),
                4,
            )
            for what in STEPS
            if device.type == "cpu" and not compiled
        },
    }


def _models(layers: int, heads: int, tokens: int, vocabulary: int) -> dict[str, NormfreeForCausalLM]:
    sizes: dict[str, Any] = {
        "n_layer": layers,
        "n_head": heads,
        "n_embd": HEAD_DIM * heads,
        "n_positions": tokens + 1,
        "vocab_size": vocabulary,
    }
    constant: dict[str, Any] = {"norm": "constant_std", "final_norm": "constant_std"}
    torch.manual_seed(0)
    return {
        NORM: NormfreeForCausalLM(NormfreeConfig(**sizes)),
        NORM_FREE: remove_norms(NormfreeForCausalLM(NormfreeConfig(**sizes, **constant))),
    }


def _calls(model: Any, batch: int, tokens: int, compiled: bool) -> dict[str, Call]:
    prompt = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=prompt, cache=cache, use_cache=True)

    @torch.inference_mode()
    def prefill() -> None:
        forward(input_ids=prompt, use_cache=False, logits_to_keep=1)

    @torch.inference_mode()
    def decode() -> None:
        forward(input_ids=prompt[:, -1:], cache=cache, use_cache=True)
        cache.crop(-1)

    decode()  # a cropped cache has other strides, for which a compiler compiles again
    return {"prefill": prefill, "decode": decode}


def _seconds_in_norms(model: NormfreeForCausalLM, call: Call) -> float:
    """Seconds that one call spends in the norms: the sum of each norm's median over ``NORM_CALLS`` calls."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    spent: dict[nn.Module, list[float]] = {norm: [] for norm in norms}

    def timed(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        out = nn.LayerNorm.forward(norm, x)
        spent[norm].append(time.perf_counter() - start)
        return out

    for norm in norms:
        norm.forward = partial(timed, norm)  # type: ignore[method-assign]
    try:
        for _ in range(NORM_CALLS):
            call()
    finally:
        for norm in norms:
            del norm.forward
    return sum(map(statistics.median, spent.values()))
