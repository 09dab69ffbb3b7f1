"""Prefill and decode of a model without norms, against the LayerNorm model it was made from.

    python benchmarks/norm_free_inference.py --out benchmarks/results/norm_free_inference-cpu.json
    python benchmarks/norm_free_inference.py --compile

GPT-2's shape with random weights: the norms' stds are set to 1, folded with ``normfree.remove_norms``, which changes
what the model says and not what it costs. Variants take turns in one process; ratios are of the same round. Prints
JSON; writes it with --out.

    prefill     one pass over --tokens tokens, last logits only
    decode      one more token behind --tokens tokens in the KV cache
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from normfree import NormfreeConfig, NormfreeForCausalLM, remove_norms
from normfree.timing import Call, interleaved, median_ratio

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORM, NORM_FREE = "LayerNorm", "norm-free"


def models(arguments: argparse.Namespace, device: torch.device) -> dict[str, NormfreeForCausalLM]:
    sizes = {"n_layer": arguments.layers, "n_head": arguments.heads, "n_embd": 64 * arguments.heads}
    sizes |= {"n_positions": arguments.tokens + 1}
    torch.manual_seed(0)
    made = {
        NORM: NormfreeForCausalLM(NormfreeConfig(**sizes)),
        NORM_FREE: remove_norms(
            NormfreeForCausalLM(NormfreeConfig(**sizes, norm="constant_std", final_norm="constant_std"))
        ),
    }
    return {name: model.eval().to(device, DTYPES[arguments.dtype]) for name, model in made.items()}


def calls(model: Any, arguments: argparse.Namespace, device: torch.device) -> dict[str, Call]:
    tokens = torch.randint(model.config.vocab_size, (arguments.batch, arguments.tokens), device=device)
    forward = torch.compile(model, dynamic=False) if arguments.compile else model
    full = DynamicCache()
    with torch.inference_mode():
        model(input_ids=tokens, cache=full, use_cache=True)

    @torch.inference_mode()
    def prefill() -> None:
        forward(input_ids=tokens, use_cache=False, logits_to_keep=1)

    @torch.inference_mode()
    def decode() -> None:
        cache = deepcopy(full)
        forward(input_ids=tokens[:, -1:], cache=cache, use_cache=True)

    @torch.inference_mode()
    def copy_cache() -> None:
        deepcopy(full)

    return {"prefill": prefill, "decode": decode, "copy of the cache": copy_cache}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32" if device.type == "cpu" else "bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    variants = {
        f"{what}, {name}": call
        for name, model in models(arguments, device).items()
        for what, call in calls(model, arguments, device).items()
    }
    seconds = interleaved(variants, arguments.rounds, device)
    # What a decoding step costs is what is left without the copy of its cache.
    for name in (NORM, NORM_FREE):
        copies = seconds.pop(f"copy of the cache, {name}")
        steps = seconds[f"decode, {name}"]
        seconds[f"decode, {name}"] = [step - copy for step, copy in zip(steps, copies, strict=True)]
    result = {
        "command": " ".join(["python benchmarks/norm_free_inference.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {name: getattr(arguments, name) for name in ("layers", "heads", "tokens", "batch")},
        "dtype": arguments.dtype,
        "compiled": arguments.compile,
        "milliseconds": {name: round(1000 * statistics.median(each), 3) for name, each in seconds.items()},
        "layernorm_time_over_norm_free": {
            what: median_ratio(seconds[f"{what}, {NORM}"], seconds[f"{what}, {NORM_FREE}"])
            for what in ("prefill", "decode")
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
