"""Time of a training step with each norm and placement, and with sparse layers, against the usual model.

    python benchmarks/step_cost.py norms --compile --out benchmarks/results/step_cost-norms-cpu.json
    python benchmarks/step_cost.py spark --compile --layers 12 --heads 12 --tokens 256 --batch 8 --dtype bf16

A step is the forward pass, the backward pass and AdamW's update (in float32; autocast with --dtype bf16). Weights are
random. Variants take turns in one process; a ratio is the median over rounds of the ratio within a round, and its
interval the middle half of the rounds. Prints JSON; writes it with --out.

    norms    models of LLaMA's shape that differ in their norms alone, against Pre-Norm with RMSNorm
    spark    models of GPT-2's shape with as many parameters each, against dense ones with GELU: sparse feed-forward
             networks (8 %), sparse attention (an eighth of the positions), which has no fused implementation, and both
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
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


def training_step(options: Options, inner: float, arguments: argparse.Namespace, device: torch.device) -> Call:
    torch.manual_seed(0)
    width = 64 * arguments.heads
    config = NormfreeConfig(
        vocab_size=arguments.vocabulary,
        n_positions=arguments.tokens,
        n_layer=arguments.layers,
        n_head=arguments.heads,
        n_embd=width,
        n_inner=round(width * inner / 16) * 16,
        **options,
    )
    model: Any = NormfreeForCausalLM(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, dynamic=False) if arguments.compile else model
    tokens = torch.randint(arguments.vocabulary, (arguments.batch, arguments.tokens), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def interval(slow: list[float], fast: list[float]) -> list[float]:
    """The first and the third quartile of the ratios within a round."""
    first, _, third = statistics.quantiles((a / b for a, b in zip(slow, fast, strict=True)), n=4)
    return [round(first, 3), round(third, 3)]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32" if device.type == "cpu" else "bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", metavar="VARIANT")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    variants, inner = GROUPS[arguments.group]
    usual, *others = variants
    unknown = [name for name in arguments.only or () if name not in variants]
    if unknown:
        parser.error(f"--only: no variant {', '.join(unknown)}; one of: {', '.join(variants)}")
    chosen = dict.fromkeys([usual, *(arguments.only or others)])
    # All variants run the same code, each in a graph of its own; beyond the default limit of 8 they would run eagerly.
    torch._dynamo.config.recompile_limit = len(variants) + 1
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    seconds = interleaved(
        {name: training_step(variants[name], inner, arguments, device) for name in chosen}, arguments.rounds, device
    )
    shape = ("layers", "heads", "tokens", "batch", "vocabulary")
    result = {
        "command": " ".join(["python benchmarks/step_cost.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {name: getattr(arguments, name) for name in shape},
        "dtype": arguments.dtype,
        "compiled": arguments.compile,
        "milliseconds": {name: round(1000 * statistics.median(each), 2) for name, each in seconds.items()},
        f"step_time_over_{usual}": {name: median_ratio(each, seconds[usual]) for name, each in seconds.items()},
        "middle_half_of_the_rounds": {name: interval(each, seconds[usual]) for name, each in seconds.items()},
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
