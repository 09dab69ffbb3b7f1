"""Sparse decode against dense: the FFN alone, and tokens a second of a whole model, at Gemma-2 2B's shapes.

    normfree bench sparse-decode ffn --dtype fp32 --threads 1
    normfree bench sparse-decode model --dtype bf16 --threads 2 --layers 26

Random weights; several layers take turns, so that none stays in a cache; every call has new inputs. Variants take turns
in one process, and ratios are of the same round: their median and the middle 80 % of rounds. The "ideal" is the ratio
of the bytes that have to be read. On a CPU every dense variant runs twice, by torch and by kernels that are written
like the sparse ones and differ in the rows they read (csrc/). One thread is timed by the processor time that it takes,
several by the clock on the wall, for which the machine has to be otherwise idle. On a GPU the sparse layers are
Triton's, the dense ones torch's, and every variant is also timed as a captured CUDA graph (", graph"): launched one by
one, the kernels of a token take longer to start than to run.

    ffn      one query through a feed-forward network. spark: n_inner 9216, 8 % of it active, r = d/2; against the dense
             network of as many parameters (two matrices), and against the gated one of Gemma-2 (three; 1.5 times the
             parameters)
    model    one more token behind 4096 in the cache, everything included: the layers, the cache's growth, norms, the
             unembedding. spark: 13824 neurons, at most 256 tokens attended to; against softmax attention and a gated
             network of 9216, which gives both the same parameters, as in the paper
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.benchmarks.decode_models import Linear, attention_by_kernel, built, filled_cache, random_matrix
from normfree.benchmarks.options import DTYPES, check_at_least, check_dtype
from normfree.benchmarks.surroundings import surroundings, usual_device
from normfree.errors import InputError, unknown_name
from normfree.probes.sparsity_probe import SparsityProbe
from normfree.spark import sparse_decode
from normfree.spark.accounting import decode_cost, total_bytes
from normfree.spark.decode import PackedFeedForward, decode_backends, sparse_feed_forward
from normfree.spark.decode.extension import all_dots, weighted_rows
from normfree.timing import Call, Clock, interleaved

N_HEAD, N_KV_HEAD, HEAD_DIM = 8, 4, 256
ACTIVE, ATTENDED = 0.08, 256
CYCLED_LAYERS = 6
BY_KERNEL = "by_kernel"
"""The name of softmax attention by the kernels of csrc/, for transformers."""
MORE_POSITIONS = 4096
GRAPH, GRAPH_WARM_UP = ", graph", 3
WHAT_COMPUTES = {
    "kernels": "everything by kernels",
    "torch": "sparse layers by kernels, the rest by torch",
    "torch, graph": "sparse layers by kernels, the rest by torch, as CUDA graphs",
}
BACKENDS = {"cpu": "cpu", "cuda": "triton"}
"""The backend of the sparse layers, by the kind of device."""
SUBJECTS = ("ffn", "model")
Measure = Callable[[], dict[str, Any]]
"""One measurement, with as many threads as are set."""


def benchmark_sparse_decode(
    subject: str,
    *,
    dtype: str = "fp32",
    threads: Sequence[int] = (1,),
    rounds: int = 20,
    width: int = 2304,
    dense_inner: int = 9216,
    layers: int = 26,
    tokens: int = 4096,
    vocabulary: int = 256_000,
    inner: int = 13_824,
) -> dict[str, Any]:
    """Times ``subject``, ffn or model, on the GPU, or without one on the CPU with each number of ``threads``.

    Args:
        dtype: fp32 or bf16.
        width: d_model.
        dense_inner: neurons of the model's gated network; of every network of ``ffn``.
        layers, tokens, vocabulary, inner: of ``model`` alone; ``inner`` are the neurons of its sparse network.

    Raises:
        InputError: the compiled kernels, or on a GPU those of Triton, cannot be used here, there is no such subject, or
            an option is out of range.
    """
    if subject not in SUBJECTS:
        raise unknown_name("subject", subject, SUBJECTS)
    check_dtype(dtype, ("fp32", "bf16"))
    check_at_least(1, rounds=rounds, threads=min(threads, default=1), dense_inner=dense_inner)
    check_at_least(2, width=width)
    device = usual_device()
    backend = BACKENDS[device.type]
    reason = decode_backends()[backend]
    if reason is not None:
        raise InputError(f"the {backend} kernels of sparse decode cannot be used: {reason}")
    torch.manual_seed(0)
    random.seed(0)
    if subject == "ffn":
        measure = _ffn(width, dense_inner, DTYPES[dtype], rounds, device)
    else:
        check_at_least(1, layers=layers, tokens=tokens, vocabulary=vocabulary, inner=inner)
        sizes: dict[str, Any] = {
            "n_layer": layers,
            "n_embd": width,
            "n_head": N_HEAD,
            "n_kv_head": N_KV_HEAD,
            "head_dim": HEAD_DIM,
            "vocab_size": vocabulary,
        }
        measure = _model(sizes, tokens, {"gated": dense_inner, "spark": inner}, DTYPES[dtype], rounds, device)
    if device.type == "cuda":
        return {**surroundings(device), "dtype": dtype, "GPU": measure()}
    found, threads_before = {}, torch.get_num_threads()
    try:
        for n_thread in threads:
            torch.set_num_threads(n_thread)
            found[f"{n_thread} threads, {_clock(device).__name__}"] = measure()
    finally:
        torch.set_num_threads(threads_before)
    cpu = f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {**surroundings(device, cpu), "dtype": dtype, **found}


def _ffn(d_model: int, n_inner: int, dtype: torch.dtype, rounds: int, device: torch.device) -> Measure:
    r, k = d_model // 2, round(ACTIVE * n_inner)

    def matrices(*shapes: tuple[int, int]) -> cycle[list[Tensor]]:
        return cycle(
            [[random_matrix(*shape, dtype=dtype).to(device) for shape in shapes] for _ in range(CYCLED_LAYERS)]
        )

    spark = matrices((r, n_inner), (n_inner, d_model - r), (n_inner, d_model))
    rows = matrices((n_inner, d_model), (n_inner, d_model), (n_inner, d_model))

    def query() -> Tensor:
        return torch.randn(1, d_model, device=device)

    def sparse(backend: str) -> Tensor:
        K1, K2, V = next(spark)
        packed = PackedFeedForward(K1, K2.t(), V)
        return sparse_feed_forward(query().to(dtype), *packed, k, F.gelu, backend=backend)

    def dense() -> Tensor:
        up, down, _ = next(rows)
        return weighted_rows(down, F.gelu(all_dots(up, query())))

    def gated() -> Tensor:
        up, down, gate = next(rows)
        x = query()
        return weighted_rows(down, F.gelu(all_dots(gate, x)) * all_dots(up, x))

    # the layout that nn.Linear has: [d_model, n_inner] for the last
    def torch_dense() -> Tensor:
        up, down, _ = next(rows)
        return F.linear(F.gelu(F.linear(query().to(dtype), up)), down.view(d_model, n_inner))

    def torch_gated() -> Tensor:
        up, down, gate = next(rows)
        x = query().to(dtype)
        return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down.view(d_model, n_inner))

    by_torch: dict[str, Call] = {"dense, torch": torch_dense, "gated, torch": torch_gated}
    if device.type == "cuda":
        calls = _with_graphs({"spark, triton": partial(sparse, "triton"), **by_torch}, CYCLED_LAYERS)
        a_call, read = CYCLED_LAYERS, ("spark, triton, graph", "dense, torch, graph")
    else:
        by_kernel: dict[str, Call] = {"dense, same kernel": dense, "gated, same kernel": gated}
        calls = {
            "spark, cpu": partial(sparse, "cpu"),
            "spark, torch": partial(sparse, "torch"),
            **by_kernel,
            **by_torch,
        }
        a_call, read = 1, ("spark, cpu", "dense, same kernel")

    def measure() -> dict[str, Any]:
        timed = interleaved(calls, rounds, device, _clock(device))
        seconds = {name: [each / a_call for each in times] for name, times in timed.items()}
        dense_bytes = 2 * n_inner * d_model * dtype.itemsize
        spark_bytes = (n_inner * r + k * (2 * d_model - r)) * dtype.itemsize
        return {
            "shape": {"d_model": d_model, "n_inner": n_inner, "r": r, "active": k, "layers_cycled": CYCLED_LAYERS},
            "milliseconds": {name: round(1000 * statistics.median(each), 3) for name, each in seconds.items()},
            "gigabytes_a_second": {
                name: round(size / 1e9 / statistics.median(seconds[name]), 1)
                for name, size in zip(read, (spark_bytes, dense_bytes), strict=True)
            },
            "ideal": {"dense": round(dense_bytes / spark_bytes, 2), "gated": round(1.5 * dense_bytes / spark_bytes, 2)},
            "times_faster": {
                f"{name}, than {other}": _ratio(seconds[other], seconds[name])
                for name in calls
                for other in calls
                if name.startswith("spark") and not other.startswith("spark") and _is_alike(name, other)
            },
        }

    return measure


def _model(
    sizes: dict[str, Any],
    tokens: int,
    inner: dict[str, int],
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
) -> Measure:
    """``inner``: the neurons of the ``gated`` network, and of the ``spark`` one."""
    options: dict[str, Any] = {
        **sizes,
        "n_positions": tokens + MORE_POSITIONS,
        "norm": "rmsnorm",
        "final_norm": "rmsnorm",
        "position": "rotary",
        "activation": "gelu_tanh",
        "attention_bias": "none",
        "mlp_bias": False,
    }
    spark_options: dict[str, Any] = {
        "ffn": "spark",
        "attention": "spark",
        "ffn_active": ACTIVE,
        "attention_active": ATTENDED,
    }
    embedding = random_matrix(sizes["vocab_size"], sizes["n_embd"], dtype=dtype).to(device)
    dense = built(NormfreeConfig(**options, ffn="gated", n_inner=inner["gated"]), dtype, embedding)
    spark = built(NormfreeConfig(**options, **spark_options, n_inner=inner["spark"]), dtype, embedding)
    dense_cache, spark_cache = (filled_cache(model.config, tokens, dtype, device) for model in (dense, spark))
    ALL_ATTENTION_FUNCTIONS.register(BY_KERNEL, attention_by_kernel)
    activity = _measured_activity(spark, spark_cache)

    @torch.inference_mode()
    def step(model: NormfreeForCausalLM, cache: DynamicCache, by_kernel: bool) -> None:
        Linear.by_kernel = by_kernel
        if model is dense:
            model.config._attn_implementation = BY_KERNEL if by_kernel else "sdpa"
        token = torch.randint(sizes["vocab_size"], (1, 1), device=device)
        model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1)

    variants = {"kernels": True, "torch": False} if device.type == "cpu" else {"torch": False}
    calls: dict[str, Call] = {
        f"{name}, {by}": partial(step, model, cache, by_kernel)
        for name, model, cache in (("dense", dense, dense_cache), ("spark", spark, spark_cache))
        for by, by_kernel in variants.items()
    }

    def measure() -> dict[str, Any]:
        with sparse_decode(spark, backend=BACKENDS[device.type]):
            every = _with_graphs(calls, 1) if device.type == "cuda" else calls
            seconds = interleaved(every, rounds, device, _clock(device))
        width = dtype.itemsize
        read = {
            name: total_bytes(
                decode_cost(model.config, context_length=tokens, bytes_per_weight=width, bytes_per_cached=width)
            )
            for name, model in (("dense", dense), ("spark", spark))
        }
        return {
            "shape": {**sizes, "tokens": tokens, "n_inner": inner},
            "parameters": {"dense": dense.num_parameters(), "spark": spark.num_parameters()},
            "active_on_average": activity,
            "tokens_a_second": {name: round(1 / statistics.median(each), 2) for name, each in seconds.items()},
            "gigabytes_a_token": {name: round(n / 1e9, 3) for name, n in read.items()},
            "ideal": round(read["dense"] / read["spark"], 2),
            "times_faster": {
                WHAT_COMPUTES[by]: _ratio(seconds[f"dense, {by}"], seconds[f"spark, {by}"])
                for by in (name.removeprefix("dense, ") for name in every if name.startswith("dense"))
            },
        }

    return measure


@torch.inference_mode()
def _measured_activity(spark: NormfreeForCausalLM, cache: DynamicCache) -> dict[str, float]:
    """Mean share of active neurons and mean number of attended tokens in one step of the masked dense computation."""
    with SparsityProbe(spark) as probe:
        spark(input_ids=torch.zeros(1, 1, dtype=torch.long, device=spark.device), cache=cache)
    return {name: round(float(layers.mean()), 4) for name, layers in probe.by_layer().items()}


def _clock(device: torch.device) -> Clock:
    """Processor time for one CPU thread, which other work on the machine does not lengthen; else the wall's."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _with_graphs(calls: dict[str, Call], n: int) -> dict[str, Call]:
    """Each variant ``n`` times in a row, launched kernel by kernel and as a captured CUDA graph."""

    def repeated(call: Call) -> None:
        for _ in range(n):
            call()

    launched: dict[str, Call] = {name: partial(repeated, call) for name, call in calls.items()}
    return launched | {f"{name}{GRAPH}": _captured(call) for name, call in launched.items()}


def _captured(call: Call) -> Call:
    """What replays the kernels of one call, on the tensors of that call: a cache is written at one place each time."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(GRAPH_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _is_alike(name: str, other: str) -> bool:
    """Whether both are CUDA graphs, or neither is."""
    return name.endswith(GRAPH) == other.endswith(GRAPH)


def _ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and the middle 80 % of them, to three significant digits."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    tenth = len(ratios) // 10
    median, low, high = (float(f"{x:.3g}") for x in (statistics.median(ratios), ratios[tenth], ratios[-1 - tenth]))
    return {"median": median, "middle_80_percent": [low, high]}
