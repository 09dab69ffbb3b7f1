"""Time of a training step with each norm and placement, and with sparse layers, against the usual model.

A step is a forward pass, a backward pass and AdamW's update (in float32; autocast with --dtype bf16). Weights are
random. Variants alternate within each round; a ratio is the median of the rounds' ratios, its interval the middle half.

    norms    models of LLaMA's shape that differ in their norms alone, against Pre-Norm with RMSNorm
    spark    models of GPT-2's shape with as many parameters each, against dense ones with GELU: sparse feed-forward
             networks (8 %), sparse attention (an eighth of the positions), which has no fused implementation, and both
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.benchmarks.machine import check_at_least, choose_dtype, milliseconds, surroundings
from normfree.devices import default_device
from normfree.errors import unknown_name
from normfree.timing import Call, interleaved, median_ratio

Options = dict[str, Any]
RMSNORM: Options = {"norm": "rmsnorm", "final_norm": "rmsnorm"}
LLAMA: Options = {
    "ffn": "gated",
    "activation": "silu",
    "attention_bias": "none",
    "mlp_bias": False,
    "position": "rotary",
    "tie_word_embeddings": False,
}
NORMS: dict[str, Options] = {
    "pre, rmsnorm": RMSNORM,
    "pre, layernorm": {"norm": "layernorm", "final_norm": "layernorm"},
    "pre, rmsnorm_scaling": {"norm": "rmsnorm_scaling", "final_norm": "rmsnorm"},
    "pre, layernorm_scaling": {"norm": "layernorm_scaling", "final_norm": "layernorm"},
    "pre, dyt": {"norm": "dyt", "final_norm": "dyt"},
    "pre, derf": {"norm": "derf", "final_norm": "derf"},
    "pre, none": {"norm": "none", "final_norm": "rmsnorm"},
    "pre, rmsnorm, qk_norm": {**RMSNORM, "qk_norm": "rmsnorm"},
    **{
        f"{placement}, rmsnorm": {**RMSNORM, "norm_placement": placement}
        for placement in ("post", "mix", "sandwich", "deepnorm", "hybrid", "hybrid_star")
    },
}
FFN: Options = {"ffn": "spark", "ffn_active": 0.08}
ATTENTION: Options = {"attention": "spark", "attention_active": 0.125}
SPARK: dict[str, Options] = {
    "dense": {},
    "dense, eager attention": {"attn_implementation": "eager"},
    "spark ffn": FFN,
    "spark ffn, exact top-k": {**FFN, "topk": "exact"},
    "spark attention": ATTENTION,
    "spark ffn and attention": {**FFN, **ATTENTION},
}
GROUPS = {
    "norms": ({name: {**LLAMA, **options} for name, options in NORMS.items()}, 8 / 3),
    "spark": (SPARK, 4.0),
}
"""The variants, the usual model first; and the width of the feed-forward network over that of the stream."""
HEAD_DIM = 64


def benchmark_step_cost(
    group: str,
    *,
    layers: int = 6,
    heads: int = 4,
    tokens: int = 128,
    batch: int = 16,
    vocabulary: int = 4096,
    dtype: str | None = None,
    compiled: bool = False,
    rounds: int = 15,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Times a training step of each variant of ``group``: norms or spark.

    Args:
        heads: of 64 dimensions each; the width follows.
        dtype: fp32 or bf16; None means fp32 on a CPU and bf16 on CUDA.
        rounds: at least two, because a single one has no spread.
        only: the variants to compare with the usual model; None means all.

    Raises:
        InputError: there is no such group or variant, or an option is out of range.
    """
    if group not in GROUPS:
        raise unknown_name("group", group, GROUPS)
    variants, inner = GROUPS[group]
    usual, *others = variants
    for name in only or ():
        if name not in variants:
            raise unknown_name("variant", name, variants)
    device = default_device()
    dtype = choose_dtype(dtype, device)
    shape = {"layers": layers, "heads": heads, "tokens": tokens, "batch": batch, "vocabulary": vocabulary}
    check_at_least(1, **shape)
    check_at_least(2, rounds=rounds)
    width = HEAD_DIM * heads
    sizes: Options = {"vocab_size": vocabulary, "n_positions": tokens, "n_layer": layers, "n_head": heads}
    sizes |= {"n_embd": width, "n_inner": round(width * inner / 16) * 16}
    # Each variant compiles the same code to its own graph; beyond the default limit of 8 they would run eagerly.
    limit = {"recompile_limit": len(variants) + 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limit) if compiled else nullcontext():
        steps = {
            name: _training_step(NormfreeConfig(**sizes, **variants[name]), batch, dtype, compiled, device)
            for name in dict.fromkeys([usual, *(only or others)])
        }
        seconds = interleaved(steps, rounds, device)
    return {
        **surroundings(device),
        "shape": shape,
        "dtype": dtype,
        "compiled": compiled,
        "milliseconds": milliseconds(seconds, 2),
        f"step_time_over_{usual}": {name: median_ratio(each, seconds[usual]) for name, each in seconds.items()},
        "middle_half_of_the_rounds": {name: _interval(each, seconds[usual]) for name, each in seconds.items()},
    }


def _training_step(config: NormfreeConfig, batch: int, dtype: str, compiled: bool, device: torch.device) -> Call:
    torch.manual_seed(0)
    model: Any = NormfreeForCausalLM(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    tokens = torch.randint(config.vocab_size, (batch, config.n_positions), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _interval(slow: list[float], fast: list[float]) -> list[float]:
    """The first and the third quartile of the ratios within a round."""
    first, _, third = statistics.quantiles((a / b for a, b in zip(slow, fast, strict=True)), n=4)
    return [round(first, 3), round(third, 3)]
