"""What surrounds the training step, each against the limit that it cannot beat, in alternating rounds.

    start         normfree --help, and what a command that trains imports, against import torch
    packing       documents to packed sequences, against tokenizers alone
    evaluation    losses of sequences, against bare forward passes over them
    checkpoint    a checkpoint of the run, against a plain write of as many bytes
    report        the report of a study of 13 configurations and 3 seeds: seconds
    depth         normfree depth on a model of 135 M parameters, in bare forward passes over the same batch
    interpret     normfree interpret on it, likewise

The models have random weights. Rates of the machine, measured in the same rounds, say how near a bare forward pass is
to what the processor can do.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.benchmarks.machine import check_at_least, matmul_rate, surroundings
from normfree.data import DataConfig, PackedData, open_corpus, prepare_data
from normfree.data.packed_sequences import write_sequences
from normfree.devices import DTYPES, default_device
from normfree.errors import unknown_name
from normfree.interpret import measure_depth
from normfree.interpret.interpretability import interpret_model
from normfree.interpret.prompts import induction_pairs
from normfree.progress import shown_on
from normfree.runner import Preset, load_preset, run_config, run_study
from normfree.studies.relu_revival import LAYERNORM_GELU
from normfree.timing import Call, seconds_once
from normfree.training.evaluation import losses_of
from normfree.training.half_precision import autocast
from normfree.training.loop import Training

LLAMA_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "n_embd": 576,
    "n_inner": 1536,
    "n_head": 9,
    "n_kv_head": 3,
    "n_positions": 2048,
    "norm": "rmsnorm",
    "final_norm": "rmsnorm",
    "ffn": "gated",
    "activation": "silu",
    "attention_bias": "none",
    "mlp_bias": False,
    "position": "rotary",
}
"""The shape of SmolLM2-135M, but for its 30 layers."""
CORPUS = f"directory:{Path(torch.__file__).parent / '_inductor'}:**/*.py"
DOCUMENT_BYTES = 2_000_000
EVALUATED = 64
"""Sequences of an evaluation."""
PEAK_SIZE, COPIED_BYTES = 1024, 1 << 28
REPORTED, REPORTED_PRESET, REPORTED_SEEDS, REPORTED_STEPS = "curse-of-depth", "smoke", (0, 1, 2), 2


@dataclass(frozen=True)
class Task:
    """What is timed, and its limit.

    calls: what is measured, by name.
    limit: its name and a call; None if there is none.
    amount, unit: of one call, for a rate; the limit's is the same.
    """

    calls: dict[str, Call]
    limit: tuple[str, Call] | None
    amount: float = 1.0
    unit: str = ""


@dataclass(frozen=True)
class Workplace:
    """What the tasks share; sizes are those of options of :func:`benchmark_pipeline`."""

    preset: Preset
    device: torch.device
    folder: Path
    layers: int
    sequences: int
    tokens: int
    probes: int


def benchmark_pipeline(
    subjects: Sequence[str] | None = None,
    *,
    preset: str = "cpu",
    layers: int = 30,
    sequences: int = 4,
    tokens: int = 128,
    probes: int = 2,
    rounds: int = 3,
) -> dict[str, Any]:
    """Times each of ``subjects`` (None: all, which takes a quarter of an hour on two cores) against its limit.

    Args:
        subjects: see the module.
        preset: of the run that is packed for, evaluated and saved: its name, or a YAML file.
        layers, sequences, tokens, probes: of ``depth`` and ``interpret``.

    Raises:
        InputError: there is no such subject or preset, or an option is out of range.
    """
    for name in subjects or ():
        if name not in TASKS:
            raise unknown_name("subject", name, TASKS)
    check_at_least(1, layers=layers, sequences=sequences, rounds=rounds)
    check_at_least(8, tokens=tokens)
    check_at_least(2, probes=probes)
    device, found = default_device(), {}
    loaded = load_preset(preset)
    disable_progress_bar()  # transformers' own, of each checkpoint
    for name in subjects or TASKS:
        with TemporaryDirectory() as folder, shown_on(None):
            workplace = Workplace(loaded, device, Path(folder), layers, sequences, tokens, probes)
            with TASKS[name](workplace) as task:
                found[name] = _measured(task, rounds, device)
    return {**surroundings(device), "preset": preset, "subjects": found, **_machine(device)}


def _measured(task: Task, rounds: int, device: torch.device) -> dict[str, Any]:
    calls = task.calls if task.limit is None else {**task.calls, task.limit[0]: task.limit[1]}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    if task.limit is not None:
        task.limit[1]()  # the first pass of a process is slower
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_once(call, device))
    result: dict[str, Any] = {"seconds": {name: round(min(each), 6) for name, each in seconds.items()}}
    if task.unit:
        result[task.unit] = {name: round(task.amount / min(each), 1) for name, each in seconds.items()}
    if task.limit is not None:
        name = task.limit[0]
        result["limit"] = name
        result["time_over_limit"] = {
            call: round(statistics.median(a / b for a, b in zip(seconds[call], seconds[name], strict=True)), 3)
            for call in task.calls
        }
    return result


@contextmanager
def _start(place: Workplace) -> Iterator[Task]:
    def python(*arguments: str) -> Call:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    yield Task(
        {
            "normfree --help": python("-m", "normfree", "--help"),
            "normfree study --list": python("-m", "normfree", "study", "--list"),
            "import normfree.training": python("-c", "import normfree.training"),
        },
        ("import torch", python("-c", "import torch")),
    )


@contextmanager
def _packing(place: Workplace) -> Iterator[Task]:
    data = _data(place)
    texts, n_bytes = [], 0
    for text in open_corpus(_data_config(place)).documents("train"):
        texts.append(text)
        n_bytes += len(text.encode("utf-8"))
        if n_bytes >= DOCUMENT_BYTES:
            break
    backend = data.tokenizer.backend_tokenizer
    length = place.preset.data.sequence_length
    yield Task(
        {
            "packing": lambda: write_sequences(
                place.folder / "packed.npy", texts, data.tokenizer, sequence_length=length
            )
        },
        ("tokenizers alone", lambda: backend.encode_batch_fast(texts, add_special_tokens=False)),
        n_bytes / 1e6,
        "megabytes_a_second",
    )


@contextmanager
def _evaluation(place: Workplace) -> Iterator[Task]:
    recipe, data = place.preset.recipe, place.preset.data
    config = run_config(place.preset, LAYERNORM_GELU, seed=0).build_model_config(data.vocab_size)
    model: Any = NormfreeForCausalLM(config).eval().to(place.device)
    model.set_attn_implementation(recipe.attn_implementation)
    tokens = torch.randint(config.vocab_size, (EVALUATED, data.sequence_length), device=place.device)

    @torch.no_grad()
    def each(read: Callable[[torch.Tensor], Any]) -> None:
        with autocast(recipe.precision, place.device):
            for batch in tokens.split(recipe.micro_batch_size):
                read(batch)

    yield Task(
        {"evaluation": lambda: each(lambda batch: losses_of(model, batch, batch))},
        ("forward pass with its logits", lambda: each(lambda batch: model(input_ids=batch, use_cache=False))),
        float(tokens.numel()),
        "tokens_a_second",
    )


@contextmanager
def _checkpoint(place: Workplace) -> Iterator[Task]:
    config = run_config(place.preset, LAYERNORM_GELU, seed=0)
    changes = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "eval_steps": 1, "save_steps": 1}
    config = config.model_copy(
        update={"recipe": place.preset.recipe.model_copy(update=changes), "data": _data_config(place)}
    )
    with Training(config, _data(place), place.folder / "run", (), None) as training:
        training.run()
        saved = place.folder / "run" / "checkpoint-1"
        content = b"".join(path.read_bytes() for path in saved.rglob("*") if path.is_file())
        yield Task(
            {"checkpoint": training.save},
            ("plain write", lambda: (place.folder / "plain").write_bytes(content)),
            len(content) / 1e6,
            "megabytes_a_second",
        )


@contextmanager
def _report(place: Workplace) -> Iterator[Task]:
    result = run_study(
        REPORTED,
        REPORTED_PRESET,
        seeds=REPORTED_SEEDS,
        steps=REPORTED_STEPS,
        out=place.folder / "study",
        cache_dir=place.folder / "data",
        progress=False,
    )
    yield Task({f"report of {len(result.results)} runs": result.write_report}, None)


@contextmanager
def _depth(place: Workplace) -> Iterator[Task]:
    model, tokens, limit = _large(place)
    yield Task({"depth": lambda: measure_depth(model, tokens, n_probe=place.probes)}, limit)


@contextmanager
def _interpret(place: Workplace) -> Iterator[Task]:
    model, tokens, limit = _large(place)
    pairs = induction_pairs(tokens, max(1, len(tokens) // 2))
    yield Task({"interpret": lambda: interpret_model(model, tokens, pairs, n_neuron=20)}, limit)


TASKS = {
    "start": _start,
    "packing": _packing,
    "evaluation": _evaluation,
    "checkpoint": _checkpoint,
    "report": _report,
    "depth": _depth,
    "interpret": _interpret,
}


def _large(place: Workplace) -> tuple[NormfreeForCausalLM, torch.Tensor, tuple[str, Call]]:
    """A model of the size of SmolLM2-135M, sequences, and a bare forward pass over them."""
    torch.manual_seed(0)
    model: Any = NormfreeForCausalLM(NormfreeConfig(**LLAMA_135M, n_layer=place.layers)).eval().to(place.device)
    tokens = torch.randint(model.config.vocab_size, (place.sequences, place.tokens), device=place.device)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens, use_cache=False)

    return model, tokens, ("bare forward pass", forward)


def _data_config(place: Workplace) -> DataConfig:
    """A corpus that is everywhere, cut as the preset cuts its own."""
    length = place.preset.data.sequence_length
    changes = {"corpus": CORPUS, "train_tokens": 64 * length, "eval_tokens": 8 * length}
    return place.preset.data.model_copy(update=changes)


def _data(place: Workplace) -> PackedData:
    return prepare_data(_data_config(place), place.folder / "data")


def _machine(device: torch.device) -> dict[str, float]:
    """The best rates of a product of two square matrices, by dtype, and of a copy in memory."""
    rates = {
        f"matmul_{name}_gflops": round(matmul_rate(device, DTYPES[name], PEAK_SIZE) / 1e9, 1)
        for name in ("fp32", "bf16")
    }
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_once(lambda: target.copy_(source), device) for _ in range(10))
    rates["copied_gigabytes_a_second"] = round(2 * COPIED_BYTES / seconds / 1e9, 1)
    return rates
