"""Training speed of our decoder, with and without telemetry, against Hugging Face's GPT-2 of the same size.

    python benchmarks/train_throughput.py --preset cpu --rounds 7

All variants train in one process, in rounds: each round runs every variant once, in a new random order, and ratios
are taken within a round, so that a machine that slows down slows down all. Prints a table; writes JSON with --out.

    ours                     our step as the preset has it: forward, backward, clipping, AdamW
    ours + telemetry         the same with the telemetry of ``normfree study`` in every step
    ours sdpa                our step with sdpa, whatever the preset has
    Hugging Face sdpa        GPT2LMHeadModel, the same step
    Hugging Face eager + entropy   attention weights returned, and their entropy taken, in every step
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from normfree import EntropyProbe, NormfreeForCausalLM
from normfree.modeling.residual_stream import ResidualStreamProbe
from normfree.modeling.sparsity_probe import SparsityProbe
from normfree.studies import Preset, load_preset
from normfree.studies.relu_revival import LAYERNORM_GELU
from normfree.studies.study import run_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_INTERVAL = 100

Step = Callable[[], None]


def training_step(model: PreTrainedModel, batch: torch.Tensor, dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    """One optimizer step as the recipe makes it; returns the forward pass's output."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    model.train()

    def step() -> Any:
        with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model(input_ids=batch, labels=batch, **options)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return output

    return step


def with_telemetry(model: NormfreeForCausalLM, step: Step) -> Step:
    def measured() -> None:
        probe = EntropyProbe(model, count_nonfinite=True)
        with probe, ResidualStreamProbe(model) as residual, SparsityProbe(model) as sparsity:
            step()
        probe.per_head().tolist(), probe.nonfinite(), residual.by_layer(), sparsity.by_layer()

    return measured


def eager_entropy(step: Callable[[], Any]) -> Step:
    def measured() -> None:
        for weights in step().attentions:
            weights = weights.detach().float()
            (-torch.special.xlogy(weights, weights).sum(-1).mean((0, 2))).tolist()

    return measured


def variants(preset: Preset, device: torch.device) -> tuple[dict[str, Step], NormfreeForCausalLM]:
    config = run_config(preset, LAYERNORM_GELU, seed=0).build_model_config(preset.data.vocab_size)
    batch = torch.randint(0, config.vocab_size, (preset.recipe.micro_batch_size, config.n_positions), device=device)
    dtype = DTYPES[preset.recipe.precision]
    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        activation_function="gelu",
        embd_pdrop=config.embedding_dropout,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )

    # A model keeps the configuration it is given, and set_attn_implementation writes to it: each gets its own.
    def ours(attn_implementation: str) -> NormfreeForCausalLM:
        model = NormfreeForCausalLM(deepcopy(config)).to(device)
        model.set_attn_implementation(attn_implementation)
        return model

    def hugging_face(attn_implementation: str) -> GPT2LMHeadModel:
        model = GPT2LMHeadModel(deepcopy(theirs)).to(device)
        model.set_attn_implementation(attn_implementation)
        return model

    plain, probed = (ours(preset.recipe.attn_implementation) for _ in range(2))
    eager = training_step(hugging_face("eager"), batch, dtype, output_attentions=True)
    return {
        "ours": training_step(plain, batch, dtype),
        "ours + telemetry": with_telemetry(probed, training_step(probed, batch, dtype)),
        "ours sdpa": training_step(ours("sdpa"), batch, dtype),
        "Hugging Face sdpa": training_step(hugging_face("sdpa"), batch, dtype),
        "Hugging Face eager + entropy": eager_entropy(eager),
    }, plain


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """The best rate of a large square product, in FLOP/s."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, 3, device) for _ in range(10))
    return 2 * size**3 / best


def timed(step: Step, n: int, device: torch.device) -> float:
    """Seconds a step, over ``n`` of them."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def flops_per_token(model: NormfreeForCausalLM) -> float:
    """Forward and backward: 6 a weight in a product, and 12 n_layer n_embd T for attention, halved for causality."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_positions" not in name)
    return 6 * weights + 6 * config.n_layer * config.n_embd * config.n_positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a variant in a round")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    preset = load_preset(arguments.preset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, ours = variants(preset, device)
    tokens = preset.recipe.micro_batch_size * preset.data.sequence_length
    for step in steps.values():
        timed(step, 2, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for _ in range(arguments.rounds):
        for name in random.sample(list(steps), len(steps)):
            seconds[name].append(timed(steps[name], arguments.steps, device))
        peaks.append(matmul_peak(device, DTYPES[preset.recipe.precision]))

    def against(name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    overhead = statistics.median(b / a - 1 for a, b in zip(seconds["ours"], seconds["ours + telemetry"], strict=True))
    achieved = [tokens * flops_per_token(ours) / each for each in seconds["ours"]]
    result = {
        "command": " ".join(["python benchmarks/train_throughput.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": preset.recipe.precision,
        "our_attn_implementation": preset.recipe.attn_implementation,
        "tokens_per_second": {name: round(tokens / statistics.median(each)) for name, each in seconds.items()},
        "ours_against_hugging_face_sdpa": round(against("ours", "Hugging Face sdpa"), 3),
        "ours_sdpa_against_hugging_face_sdpa": round(against("ours sdpa", "Hugging Face sdpa"), 3),
        "ours_with_telemetry_every_step_against_eager_entropy": round(
            against("ours + telemetry", "Hugging Face eager + entropy"), 3
        ),
        "telemetry_overhead_every_step": round(overhead, 4),
        f"telemetry_overhead_every_{DEFAULT_INTERVAL}_steps": round(overhead / DEFAULT_INTERVAL, 5),
        "share_of_measured_matmul_peak": round(
            statistics.median(a / p for a, p in zip(achieved, peaks, strict=True)), 3
        ),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
