"""Training speed of Normfree's decoder, with and without telemetry, against Hugging Face's GPT-2 of the same size.

Variants alternate within each round, in a new random order, and ratios are taken per round, which cancels machine
drift.

    ours                     Normfree's step as the preset has it: forward, backward, clipping, AdamW
    ours + telemetry         the same with the telemetry of ``normfree study`` in every step
    ours sdpa                Normfree's step with sdpa, whatever the preset has
    Hugging Face sdpa        GPT2LMHeadModel, the same step
    Hugging Face eager + entropy   attention weights returned, and their entropy computed, in every step
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from normfree import NormfreeForCausalLM
from normfree.benchmarks.machine import DTYPES, check_at_least, surroundings, usual_device
from normfree.columns import TOKENS_PER_SECOND
from normfree.runner import Preset, load_preset, run_config
from normfree.studies.relu_revival import LAYERNORM_GELU
from normfree.timing import median_ratio
from normfree.training.records import RunRecords
from normfree.training.telemetry import Telemetry, recorded_probes

DEFAULT_INTERVAL = 100
"""A recipe's usual interval of telemetry, in steps."""
WARM_UP_STEPS = 2

Step = Callable[[], Any]


def benchmark_training(
    *, preset: str = "cpu", rounds: int = 7, steps: int = 5, peak_size: int = 2048
) -> dict[str, Any]:
    """Times a training step of the preset's baseline (SM+LN+G), and of Hugging Face's GPT-2.

    Args:
        preset: its name, or a YAML file.
        steps: steps of a variant in a round.
        peak_size: side of the square matrices whose product measures the device's peak.

    Raises:
        InputError: there is no such preset, or an option is out of range.
    """
    check_at_least(1, rounds=rounds, steps=steps, peak_size=peak_size)
    loaded = load_preset(preset)
    recipe = loaded.recipe
    device = usual_device()
    tokens = recipe.micro_batch_size * loaded.data.sequence_length
    peaks = []
    with TemporaryDirectory() as folder:
        variants, ours = _variants(loaded, device, Path(folder))
        for step in variants.values():
            _timed(step, WARM_UP_STEPS, device)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name in random.sample(list(variants), len(variants)):
                seconds[name].append(_timed(variants[name], steps, device))
            peaks.append(_matmul_peak(device, DTYPES[recipe.precision], peak_size))

    def against(name: str, other: str) -> float:
        return median_ratio(seconds[other], seconds[name])

    overhead = statistics.median(b / a - 1 for a, b in zip(seconds["ours"], seconds["ours + telemetry"], strict=True))
    achieved = [tokens * _flops_per_token(ours) / each for each in seconds["ours"]]
    return {
        **surroundings(device),
        "precision": recipe.precision,
        "our_attn_implementation": recipe.attn_implementation,
        TOKENS_PER_SECOND: {name: round(tokens / statistics.median(each)) for name, each in seconds.items()},
        "ours_against_hugging_face_sdpa": against("ours", "Hugging Face sdpa"),
        "ours_sdpa_against_hugging_face_sdpa": against("ours sdpa", "Hugging Face sdpa"),
        "ours_with_telemetry_every_step_against_eager_entropy": against(
            "ours + telemetry", "Hugging Face eager + entropy"
        ),
        "telemetry_overhead_every_step": round(overhead, 4),
        f"telemetry_overhead_every_{DEFAULT_INTERVAL}_steps": round(overhead / DEFAULT_INTERVAL, 5),
        "share_of_measured_matmul_peak": round(
            statistics.median(a / p for a, p in zip(achieved, peaks, strict=True)), 3
        ),
    }


def _variants(preset: Preset, device: torch.device, folder: Path) -> tuple[dict[str, Step], NormfreeForCausalLM]:
    """Every variant's step, and the model of ``ours``; ``folder`` holds the records of telemetry."""
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

    def build(kind: Any, options: Any, attn_implementation: str) -> Any:
        # A model keeps the configuration it is given, and set_attn_implementation writes to it.
        model = kind(deepcopy(options)).to(device)
        model.set_attn_implementation(attn_implementation)
        return model

    plain, probed = (build(NormfreeForCausalLM, config, preset.recipe.attn_implementation) for _ in range(2))
    eager = _training_step(build(GPT2LMHeadModel, theirs, "eager"), batch, dtype, output_attentions=True)
    return {
        "ours": _training_step(plain, batch, dtype, return_logits=False),
        "ours + telemetry": _with_telemetry(probed, _training_step(probed, batch, dtype, return_logits=False), folder),
        "ours sdpa": _training_step(build(NormfreeForCausalLM, config, "sdpa"), batch, dtype, return_logits=False),
        "Hugging Face sdpa": _training_step(build(GPT2LMHeadModel, theirs, "sdpa"), batch, dtype),
        "Hugging Face eager + entropy": _eager_entropy(eager),
    }, plain


def _training_step(model: PreTrainedModel, batch: torch.Tensor, dtype: torch.dtype, **options: Any) -> Step:
    """One optimizer step, which returns the output of the forward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    model.train()

    def step() -> Any:
        with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model(input_ids=batch, labels=batch, use_cache=False, **options)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return output

    return step


def _with_telemetry(model: NormfreeForCausalLM, step: Step, folder: Path) -> Step:
    """``step`` with telemetry each time."""
    telemetry = Telemetry(RunRecords(folder), recorded_probes(model), every=1, tokens_per_step=1)
    count = itertools.count()

    def measured() -> None:
        telemetry.begin_step(next(count))
        step()
        telemetry.end_step()

    return measured


def _eager_entropy(step: Step) -> Step:
    def measured() -> None:
        for weights in step().attentions:
            weights = weights.detach().float()
            (-torch.special.xlogy(weights, weights).sum(-1).mean((0, 2))).tolist()

    return measured


def _timed(step: Step, n: int, device: torch.device) -> float:
    """Seconds a step, over ``n`` of them."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def _matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best rate of a product of two matrices [size, size], in FLOP/s."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(_timed(lambda: a @ b, 3, device) for _ in range(10))
    return 2 * size**3 / best


def _flops_per_token(model: NormfreeForCausalLM) -> float:
    """Forward and backward: 6 a weight in a product, and 12 n_layer n_embd T for attention, halved for causality."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_positions" not in name)
    return 6 * weights + 6 * config.n_layer * config.n_embd * config.n_positions
