"""Training speed of Normfree's decoder, with and without telemetry, against Hugging Face's GPT-2 of the same size.

Variants alternate within each round, in a new random order, and ratios are taken per round, which cancels machine
drift.

    normfree                       Normfree's step as the preset has it: forward, backward, clipping, AdamW
    normfree + telemetry           the same with the telemetry of ``normfree study`` in every step
    normfree, one thread           Normfree's step on one thread of the CPU, where there are several
    Hugging Face sdpa              GPT2LMHeadModel, the same step
    Hugging Face eager + entropy   attention weights returned, and their entropy computed, in every step

Peak memory is what a step needs above model and optimizer: on a CPU in a process of its own, with sdpa on both sides.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.benchmarks.machine import check_at_least, matmul_rate, surroundings
from normfree.benchmarks.peak_memory import MEMORY_RESET, peak_here, peak_in_fresh_process
from normfree.columns import TOKENS_PER_SECOND
from normfree.devices import DTYPES, default_device
from normfree.runner import Preset, load_preset, run_config
from normfree.studies.relu_revival import LAYERNORM_GELU
from normfree.timing import median_ratio
from normfree.training.heap import keep_freed_memory
from normfree.training.records import RunRecords
from normfree.training.telemetry import Telemetry, recorded_probes

DEFAULT_INTERVAL = 100
"""A recipe's usual interval of telemetry, in steps."""
WARM_UP_STEPS = 2
ONE_THREAD = "normfree, one thread"

Step = Callable[[], Any]


def benchmark_training(
    *, preset: str = "cpu", tokens: int | None = None, rounds: int = 7, steps: int = 5, peak_size: int = 2048
) -> dict[str, Any]:
    """Times a training step of the preset's baseline (SM+LN+G), and of Hugging Face's GPT-2.

    Args:
        preset: its name, or a YAML file.
        tokens: of a sequence; a step has as many tokens in all as the preset's. None: as the preset has it.
        steps: steps of a variant in a round.
        peak_size: side of the square matrices whose product measures the device's peak.

    Raises:
        InputError: there is no such preset, or an option is out of range.
    """
    check_at_least(1, rounds=rounds, steps=steps, peak_size=peak_size)
    check_at_least(2, **({} if tokens is None else {"tokens": tokens}))
    loaded = _with_sequences_of(tokens, load_preset(preset))
    recipe = loaded.recipe
    device = default_device()
    keep_freed_memory()
    step_tokens = recipe.micro_batch_size * loaded.data.sequence_length
    peaks = []
    with TemporaryDirectory() as folder:
        variants, decoder = _variants(loaded, device, Path(folder))
        for step in variants.values():
            _timed(step, WARM_UP_STEPS, device)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name in random.sample(list(variants), len(variants)):
                seconds[name].append(_timed(variants[name], steps, device))
            peaks.append(matmul_rate(device, DTYPES[recipe.precision], peak_size))

    def against(name: str, other: str) -> float:
        return median_ratio(seconds[other], seconds[name])

    overhead = statistics.median(
        b / a - 1 for a, b in zip(seconds["normfree"], seconds["normfree + telemetry"], strict=True)
    )
    achieved = [step_tokens * _flops_per_token(decoder) / each for each in seconds["normfree"]]
    memory = _peak_memory(loaded, device, variants)
    threads = {"normfree_against_one_thread": against("normfree", ONE_THREAD)} if ONE_THREAD in seconds else {}
    return {
        **surroundings(device),
        "precision": recipe.precision,
        "attn_implementation": recipe.attn_implementation,
        "sequences": recipe.micro_batch_size,
        "tokens": loaded.data.sequence_length,
        TOKENS_PER_SECOND: {name: round(step_tokens / statistics.median(each)) for name, each in seconds.items()},
        "normfree_against_hugging_face_sdpa": against("normfree", "Hugging Face sdpa"),
        "normfree_with_telemetry_every_step_against_eager_entropy": against(
            "normfree + telemetry", "Hugging Face eager + entropy"
        ),
        "telemetry_overhead_every_step": round(overhead, 4),
        f"telemetry_overhead_every_{DEFAULT_INTERVAL}_steps": round(overhead / DEFAULT_INTERVAL, 5),
        "share_of_measured_matmul_peak": round(
            statistics.median(a / p for a, p in zip(achieved, peaks, strict=True)), 3
        ),
        **threads,
        **memory,
    }


def _with_sequences_of(tokens: int | None, preset: Preset) -> Preset:
    """The preset with sequences of ``tokens``, and as many tokens in a micro-batch."""
    if tokens is None:
        return preset
    micro_batch_size = max(1, preset.recipe.micro_batch_size * preset.data.sequence_length // tokens)
    changes = {"batch_size": micro_batch_size, "micro_batch_size": micro_batch_size}
    return preset.model_copy(
        update={
            "data": preset.data.model_copy(update={"sequence_length": tokens}),
            "recipe": preset.recipe.model_copy(update=changes),
        }
    )


def _variants(preset: Preset, device: torch.device, folder: Path) -> tuple[dict[str, Step], NormfreeForCausalLM]:
    """Every variant's step, and the model of ``normfree``; ``folder`` holds the records of telemetry."""
    dtype, batch = DTYPES[preset.recipe.precision], _batch(preset, device)
    plain, probed = (_normfree_model(preset, device) for _ in range(2))
    plain_step = _training_step(plain, batch, dtype, return_logits=False)
    eager = _training_step(_hugging_face_model(preset, device, "eager"), batch, dtype, output_attentions=True)
    several = device.type == "cpu" and torch.get_num_threads() > 1
    return {
        "normfree": plain_step,
        "normfree + telemetry": _with_telemetry(
            probed, _training_step(probed, batch, dtype, return_logits=False), folder
        ),
        **({ONE_THREAD: _on_one_thread(plain_step)} if several else {}),
        "Hugging Face sdpa": _training_step(_hugging_face_model(preset, device, "sdpa"), batch, dtype),
        "Hugging Face eager + entropy": _eager_entropy(eager),
    }, plain


def _normfree_config(preset: Preset) -> NormfreeConfig:
    return run_config(preset, LAYERNORM_GELU, seed=0).build_model_config(preset.data.vocab_size)


def _normfree_model(preset: Preset, device: torch.device) -> NormfreeForCausalLM:
    model = NormfreeForCausalLM(_normfree_config(preset))
    model.set_attn_implementation(preset.recipe.attn_implementation)
    return cast(Any, model).to(device)


def _hugging_face_model(preset: Preset, device: torch.device, attn_implementation: str) -> PreTrainedModel:
    size = _normfree_config(preset)
    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.n_positions,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd,
        activation_function="gelu",
        embd_pdrop=size.embedding_dropout,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation(attn_implementation)
    return cast(Any, model).to(device)


def _batch(preset: Preset, device: torch.device) -> torch.Tensor:
    shape = preset.recipe.micro_batch_size, preset.data.sequence_length
    return torch.randint(0, preset.data.vocab_size, shape, device=device)


def _on_one_thread(step: Step) -> Step:
    def measured() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            step()
        finally:
            torch.set_num_threads(before)

    return measured


def _peak_memory(preset: Preset, device: torch.device, variants: dict[str, Step]) -> dict[str, Any]:
    """``peak_mib`` of a step of each side, and their ratio; nothing on a CPU where the system does not tell."""
    names = ("normfree", "Hugging Face sdpa")
    if device.type == "cuda":
        peaks = {name: peak_here(variants[name], device) for name in names}
    elif MEMORY_RESET.exists():
        peaks = {name: peak_in_fresh_process(_warmed_up, name, preset) for name in names}
    else:
        return {}
    ratio = round(peaks["normfree"] / peaks["Hugging Face sdpa"], 3)
    mebibytes = {name: round(peak / 2**20, 1) for name, peak in peaks.items()}
    return {"peak_mib": mebibytes, "peak_memory_over_hugging_face": ratio}


def _warmed_up(name: str, preset: Preset) -> Step:
    """A step of one side, after one of few tokens, which makes the optimizer's state."""
    device, dtype = torch.device("cpu"), DTYPES[preset.recipe.precision]
    batch = _batch(preset, device)
    if name == "normfree":
        keep_freed_memory()
    model = _normfree_model(preset, device) if name == "normfree" else _hugging_face_model(preset, device, "sdpa")
    options = {"return_logits": False} if name == "normfree" else {}
    optimizer = _optimizer(model)
    _training_step(model, batch[:1, :2], dtype, optimizer, **options)()
    return _training_step(model, batch, dtype, optimizer, **options)


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)


def _training_step(
    model: PreTrainedModel,
    batch: torch.Tensor,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Step:
    """One optimizer step, which returns the output of the forward pass."""
    optimizer = optimizer or _optimizer(model)
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


def _flops_per_token(model: NormfreeForCausalLM) -> float:
    """Forward and backward: 6 a weight in a product, and 12 n_layer n_embd T for attention, halved for causality."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_positions" not in name)
    return 6 * weights + 6 * config.n_layer * config.n_embd * config.n_positions
