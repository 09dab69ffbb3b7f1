"""Sparse decode against dense: the FFN alone, and tokens a second of a whole model, at Gemma-2 2B's shapes.

    normfree bench sparse-decode ffn --dtype fp32 --threads 1
    normfree bench sparse-decode model --dtype bf16 --threads 2 --layers 26

Random weights; several layers take turns, so that none stays in a cache; every call has new inputs. Variants take turns
in one process, and ratios are of the same round: their median and the middle 80 % of rounds. Every dense variant runs
twice, by torch and by kernels that are written like the sparse ones and differ in the rows they read (csrc/). The
"ideal" is the ratio of the bytes that have to be read. One thread is timed by the processor time that it takes, several
by the clock on the wall, for which the machine has to be otherwise idle.

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
from normfree.benchmarks.surroundings import surroundings
from normfree.errors import InputError, unknown_name
from normfree.modeling.spark_decode import sparse_decode
from normfree.modeling.sparsity_probe import SparsityProbe
from normfree.sparsity.accounting import decode_cost, total_bytes
from normfree.sparsity.decode import PackedFeedForward, decode_backends, sparse_feed_forward
from normfree.sparsity.decode.extension import all_dots, weighted_rows
from normfree.timing import Call, Clock, interleaved

N_HEAD, N_KV_HEAD, HEAD_DIM = 8, 4, 256
ACTIVE, ATTENDED = 0.08, 256
CYCLED_LAYERS = 6
BY_KERNEL = "by_kernel"
"""The name of softmax attention by the kernels of csrc/, for transformers."""
MORE_POSITIONS = 4096
CPU = torch.device("cpu")
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
    """Times ``subject``, ffn or model, on the CPU with each number of threads.

    Args:
        dtype: fp32 or bf16.
        width: d_model.
        dense_inner: neurons of the model's gated network; of every network of ``ffn``.
        layers, tokens, vocabulary, inner: of ``model`` alone; ``inner`` are the neurons of its sparse network.

    Raises:
        InputError: the compiled kernels cannot be used here, there is no such subject, or an option is out of range.
    """
    if subject not in SUBJECTS:
        raise unknown_name("subject", subject, SUBJECTS)
    check_dtype(dtype, ("fp32", "bf16"))
    check_at_least(1, rounds=rounds, threads=min(threads, default=1), dense_inner=dense_inner)
    check_at_least(2, width=width)
    reason = decode_backends()["cpu"]
    if reason is not None:
        raise InputError(f"the compiled kernels cannot be used: {reason}")
    torch.manual_seed(0)
    random.seed(0)
    if subject == "ffn":
        measure = _ffn(width, dense_inner, DTYPES[dtype], rounds)
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
        measure = _model(sizes, tokens, {"gated": dense_inner, "spark": inner}, DTYPES[dtype], rounds)
    found, threads_before = {}, torch.get_num_threads()
    try:
        for n_thread in threads:
            torch.set_num_threads(n_thread)
            found[f"{n_thread} threads, {_clock().__name__}"] = measure()
    finally:
        torch.set_num_threads(threads_before)
    cpu = f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {**surroundings(CPU, cpu), "dtype": dtype, **found}


def _ffn(d_model: int, n_inner: int, dtype: torch.dtype, rounds: int) -> Measure:
    r, k = d_model // 2, round(ACTIVE * n_inner)

    def matrices(*shapes: tuple[int, int]) -> cycle[list[Tensor]]:
        return cycle([[random_matrix(*shape, dtype=dtype) for shape in shapes] for _ in range(CYCLED_LAYERS)])

    spark = matrices((r, n_inner), (n_inner, d_model - r), (n_inner, d_model))
    rows = matrices((n_inner, d_model), (n_inner, d_model), (n_inner, d_model))

    def query() -> Tensor:
        return torch.randn(1, d_model)

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

    calls: dict[str, Call] = {
        "spark, cpu": lambda: sparse("cpu"),
        "spark, torch": lambda: sparse("torch"),
        "dense, same kernel": dense,
        "dense, torch": torch_dense,
        "gated, same kernel": gated,
        "gated, torch": torch_gated,
    }

    def measure() -> dict[str, Any]:
        seconds = interleaved(calls, rounds, CPU, _clock())
        dense_bytes = 2 * n_inner * d_model * dtype.itemsize
        spark_bytes = (n_inner * r + k * (2 * d_model - r)) * dtype.itemsize
        return {
            "shape": {"d_model": d_model, "n_inner": n_inner, "r": r, "active": k, "layers_cycled": CYCLED_LAYERS},
            "milliseconds": {name: round(1000 * statistics.median(each), 3) for name, each in seconds.items()},
            "gigabytes_a_second": {
                "spark, cpu": round(spark_bytes / 1e9 / statistics.median(seconds["spark, cpu"]), 1),
                "dense, same kernel": round(dense_bytes / 1e9 / statistics.median(seconds["dense, same kernel"]), 1),
            },
            "ideal": {"dense": round(dense_bytes / spark_bytes, 2), "gated": round(1.5 * dense_bytes / spark_bytes, 2)},
            "times_faster": {
                f"spark, {backend}, than {name}": _ratio(seconds[name], seconds[f"spark, {backend}"])
                for backend in ("cpu", "torch")
                for name in calls
                if not name.startswith("spark")
            },
        }

    return measure


def _model(sizes: dict[str, Any], tokens: int, inner: dict[str, int], dtype: torch.dtype, rounds: int) -> Measure:
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
    embedding = random_matrix(sizes["vocab_size"], sizes["n_embd"], dtype=dtype)
    dense = built(NormfreeConfig(**options, ffn="gated", n_inner=inner["gated"]), dtype, embedding)
    spark = built(NormfreeConfig(**options, **spark_options, n_inner=inner["spark"]), dtype, embedding)
    dense_cache, spark_cache = (filled_cache(model.config, tokens, dtype) for model in (dense, spark))
    ALL_ATTENTION_FUNCTIONS.register(BY_KERNEL, attention_by_kernel)
    activity = _measured_activity(spark, spark_cache)

    @torch.inference_mode()
    def step(model: NormfreeForCausalLM, cache: DynamicCache, by_kernel: bool) -> None:
        Linear.by_kernel = by_kernel
        if model is dense:
            model.config._attn_implementation = BY_KERNEL if by_kernel else "sdpa"
        token = torch.randint(sizes["vocab_size"], (1, 1))
        model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1)

    calls: dict[str, Call] = {
        f"{name}, {'kernels' if by_kernel else 'torch'}": partial(step, model, cache, by_kernel)
        for name, model, cache in (("dense", dense, dense_cache), ("spark", spark, spark_cache))
        for by_kernel in (True, False)
    }

    def measure() -> dict[str, Any]:
        with sparse_decode(spark, backend="cpu"):
            seconds = interleaved(calls, rounds, CPU, _clock())
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
                "everything by kernels": _ratio(seconds["dense, kernels"], seconds["spark, kernels"]),
                "sparse layers by kernels, the rest by torch": _ratio(seconds["dense, torch"], seconds["spark, torch"]),
            },
        }

    return measure


@torch.inference_mode()
def _measured_activity(spark: NormfreeForCausalLM, cache: DynamicCache) -> dict[str, float]:
    """Mean share of active neurons and mean number of attended tokens in one step of the masked dense computation."""
    with SparsityProbe(spark) as probe:
        spark(input_ids=torch.zeros(1, 1, dtype=torch.long), cache=cache)
    return {name: round(float(layers.mean()), 4) for name, layers in probe.by_layer().items()}


def _clock() -> Clock:
    """Processor time for one thread, which other work on the machine does not lengthen; for more, the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and the middle 80 % of them."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    tenth = len(ratios) // 10
    return {
        "median": round(statistics.median(ratios), 2),
        "middle_80_percent": [round(ratios[tenth], 2), round(ratios[-1 - tenth], 2)],
    }
