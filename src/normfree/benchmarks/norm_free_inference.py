"""Prefill and decode of a model without norms, against the LayerNorm model it was made from.

GPT-2's shape with random weights; the norms' stds are 1 and folded with ``normfree.remove_norms``, which changes the
output and not the cost. Variants alternate within each round, and ratios are taken per round.

    prefill     one pass over the prompt, last logits only
    decode      one more token after the prompt in the KV cache

Without norms a model cannot gain more than the norms' own time. They are timed alone, one after the other on inputs of
the same shape; their share of the LayerNorm model's time is the bound. Only in eager mode: a compiler fuses norms with
the operations around them.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from normfree import NormfreeConfig, NormfreeForCausalLM, remove_norms
from normfree.benchmarks.machine import DTYPES, check_at_least, choose_dtype, milliseconds, surroundings, usual_device
from normfree.timing import Call, interleaved, median_ratio

NORM, NORM_FREE = "LayerNorm", "norm-free"
STEPS = ("prefill", "decode")
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
    device = usual_device()
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
    if not compiled:
        variants |= _norms_alone(models[NORM], batch, {"prefill": tokens, "decode": 1})
    seconds = interleaved(variants, rounds, device)
    # Every decoding step copies the cache first; the copy is timed alone and subtracted.
    for name in (NORM, NORM_FREE):
        copies = seconds.pop(f"copy of the cache, {name}")
        steps = seconds[f"decode, {name}"]
        seconds[f"decode, {name}"] = [step - copy for step, copy in zip(steps, copies, strict=True)]
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
            what: median_ratio(seconds[f"{what}, norms alone"], seconds[f"{what}, {NORM}"])
            for what in STEPS
            if not compiled
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
    full = DynamicCache()
    with torch.inference_mode():
        model(input_ids=prompt, cache=full, use_cache=True)

    @torch.inference_mode()
    def prefill() -> None:
        forward(input_ids=prompt, use_cache=False, logits_to_keep=1)

    @torch.inference_mode()
    def decode() -> None:
        cache = deepcopy(full)
        forward(input_ids=prompt[:, -1:], cache=cache, use_cache=True)

    @torch.inference_mode()
    def copy_cache() -> None:
        deepcopy(full)

    return {"prefill": prefill, "decode": decode, "copy of the cache": copy_cache}


def _norms_alone(model: NormfreeForCausalLM, batch: int, positions: dict[str, int]) -> dict[str, Call]:
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]

    @torch.inference_mode()
    def run(x: torch.Tensor) -> None:
        for norm in norms:
            norm(x)

    def call(n_position: int) -> Call:
        x = torch.randn(batch, n_position, model.config.n_embd, dtype=model.dtype, device=model.device)
        return partial(run, x)

    return {f"{what}, norms alone": call(n_position) for what, n_position in positions.items()}
