"""Sparse decode against dense: the FFN alone, and tokens a second of a whole model, at Gemma-2 2B's shapes.

Random weights; several layers alternate, so that none stays in a CPU cache; every call has new inputs. Variants
alternate within each round; ratios are per round: their median and the middle 80 %. "ideal" is the ratio of the bytes
that have to be read. On a CPU every dense variant runs twice: by torch, and by kernels written like the sparse ones
that read all rows (csrc/). One thread is timed by processor time, several by wall-clock time, which needs an idle
machine. On a GPU the sparse layers are Triton's, the dense ones torch's, and every variant is also timed as a captured
CUDA graph (", graph"): launching the kernels of a token one by one takes longer than running them.

    ffn      one query through a feed-forward network. spark: n_inner 9216, 8 % of it active, r = d/2; against the dense
             network of as many parameters (two matrices), and the gated one of Gemma-2 (three; 1.5 times as many)
    model    one more token after 4096 in the cache, everything included: layers, growth of the cache, norms,
             unembedding. spark: 13824 neurons, at most 256 tokens attended to; against softmax attention and a gated
             network of 9216, which gives both the same number of parameters, as in the paper
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
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
from normfree.benchmarks.machine import (
    check_at_least,
    choose_dtype,
    clock_of,
    milliseconds,
    surroundings,
)
from normfree.devices import DTYPES, default_device
from normfree.errors import InputError, unknown_name
from normfree.probes.sparsity_probe import SparsityProbe
from normfree.spark import sparse_decode
from normfree.spark.accounting import decode_cost, total_bytes
from normfree.spark.decode import PackedFeedForward, decode_backends, sparse_feed_forward
from normfree.spark.decode.backends import PREDICTOR_BY_NEURON
from normfree.spark.decode.extension import all_dots
from normfree.timing import Call, interleaved

HEADS = {"n_head": 8, "n_kv_head": 4, "head_dim": 256}
GEMMA: dict[str, Any] = {
    "norm": "rmsnorm",
    "final_norm": "rmsnorm",
    "position": "rotary",
    "activation": "gelu_tanh",
    "attention_bias": "none",
    "mlp_bias": False,
}
ACTIVE = 0.08
SPARK: dict[str, Any] = {"ffn": "spark", "attention": "spark", "ffn_active": ACTIVE, "attention_active": 256}
CYCLED_LAYERS = 6
BY_KERNEL = "by_kernel"
"""transformers' name of softmax attention by the kernels of csrc/."""
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
    check_at_least(1, rounds=rounds, threads=min(threads, default=1), dense_inner=dense_inner)
    check_at_least(2, width=width)
    device = default_device()
    choose_dtype(dtype, device)
    backend = BACKENDS[device.type]
    reason = decode_backends()[backend]
    if reason is not None:
        raise InputError(f"the {backend} kernels of sparse decode cannot be used: {reason}")
    torch.manual_seed(0)
    random.seed(0)
    if subject == "ffn":
        measure = partial(_measure_ffn, _Networks(width, dense_inner, DTYPES[dtype], device), rounds)
    else:
        check_at_least(1, layers=layers, tokens=tokens, vocabulary=vocabulary, inner=inner)
        sizes = {"n_layer": layers, "n_embd": width, **HEADS, "vocab_size": vocabulary}
        models = _Models(sizes, tokens, {"gated": dense_inner, "spark": inner}, DTYPES[dtype], device)
        measure = partial(_measure_model, models, rounds)
    if device.type == "cuda":
        return {**surroundings(device), "dtype": dtype, "GPU": measure()}
    found, threads_before = {}, torch.get_num_threads()
    try:
        for n_thread in threads:
            torch.set_num_threads(n_thread)
            found[f"{n_thread} threads, {clock_of(device).__name__}"] = measure()
    finally:
        torch.set_num_threads(threads_before)
    cpu = f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {**surroundings(device, cpu), "dtype": dtype, **found}


class _Networks:
    """Feed-forward networks of random weights; every call takes the next layer and a new query."""

    def __init__(self, d_model: int, n_inner: int, dtype: torch.dtype, device: torch.device) -> None:
        self.d_model, self.n_inner, self.dtype, self.device = d_model, n_inner, dtype, device
        self.r, self.k = d_model // 2, round(ACTIVE * n_inner)
        self._spark = self._matrices((n_inner, self.r), (n_inner, d_model - self.r), (n_inner, d_model))
        self._rows = self._matrices(*[(n_inner, d_model)] * 3)

    def _matrices(self, *shapes: tuple[int, int]) -> cycle[list[Tensor]]:
        def layer() -> list[Tensor]:
            return [random_matrix(*shape, dtype=self.dtype).to(self.device) for shape in shapes]

        return cycle([layer() for _ in range(CYCLED_LAYERS)])

    def _query(self) -> Tensor:
        return torch.randn(1, self.d_model, device=self.device)

    def sparse(self, backend: str) -> Tensor:
        K1, K2, V = next(self._spark)
        K1 = K1.t() if backend in PREDICTOR_BY_NEURON else K1.view(self.r, self.n_inner)
        packed = PackedFeedForward(K1, K2.t(), V)
        return sparse_feed_forward(self._query().to(self.dtype), *packed, self.k, F.gelu, backend=backend)

    # nn.Linear's layout, in which a matrix is one stream: [d_model, n_inner] for the last
    def dense(self) -> Tensor:
        up, down, _ = next(self._rows)
        return all_dots(down.view(self.d_model, self.n_inner), F.gelu(all_dots(up, self._query())))

    def gated(self) -> Tensor:
        up, down, gate = next(self._rows)
        x = self._query()
        return all_dots(down.view(self.d_model, self.n_inner), F.gelu(all_dots(gate, x)) * all_dots(up, x))

    def torch_dense(self) -> Tensor:
        up, down, _ = next(self._rows)
        return F.linear(F.gelu(F.linear(self._query().to(self.dtype), up)), down.view(self.d_model, self.n_inner))

    def torch_gated(self) -> Tensor:
        up, down, gate = next(self._rows)
        x = self._query().to(self.dtype)
        return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down.view(self.d_model, self.n_inner))


@torch.inference_mode()
def _measure_ffn(networks: _Networks, rounds: int) -> dict[str, Any]:
    device, d_model, n_inner, r, k = networks.device, networks.d_model, networks.n_inner, networks.r, networks.k
    by_torch: dict[str, Call] = {"dense, torch": networks.torch_dense, "gated, torch": networks.torch_gated}
    if device.type == "cuda":
        calls = _with_graphs({"spark, triton": partial(networks.sparse, "triton"), **by_torch}, CYCLED_LAYERS)
        a_call, read = CYCLED_LAYERS, ("spark, triton, graph", "dense, torch, graph")
    else:
        calls = {f"spark, {backend}": partial(networks.sparse, backend) for backend in ("cpu", "torch")}
        calls |= {"dense, same kernel": networks.dense, "gated, same kernel": networks.gated, **by_torch}
        a_call, read = 1, ("spark, cpu", "dense, same kernel")
    timed = interleaved(calls, rounds, device, clock_of(device))
    seconds = {name: [each / a_call for each in times] for name, times in timed.items()}
    dense_bytes = 2 * n_inner * d_model * networks.dtype.itemsize
    spark_bytes = (n_inner * r + k * (2 * d_model - r)) * networks.dtype.itemsize
    return {
        "shape": {"d_model": d_model, "n_inner": n_inner, "r": r, "active": k, "layers_cycled": CYCLED_LAYERS},
        "milliseconds": milliseconds(seconds),
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


class _Models:
    """A dense and a sparse model of random weights, which share their embeddings, and their filled caches.

    inner: the neurons of the ``gated`` network, and of the ``spark`` one.
    """

    def __init__(
        self, sizes: dict[str, int], tokens: int, inner: dict[str, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sizes, self.tokens, self.inner, self.dtype, self.device = sizes, tokens, inner, dtype, device
        options: dict[str, Any] = {**GEMMA, **sizes, "n_positions": tokens + MORE_POSITIONS}
        embedding = random_matrix(sizes["vocab_size"], sizes["n_embd"], dtype=dtype).to(device)
        self.dense = built(NormfreeConfig(**options, ffn="gated", n_inner=inner["gated"]), dtype, embedding)
        self.spark = built(NormfreeConfig(**options, **SPARK, n_inner=inner["spark"]), dtype, embedding)
        both = (self.dense, self.spark)
        self._dense_cache, self._spark_cache = (filled_cache(each.config, tokens, dtype, device) for each in both)
        ALL_ATTENTION_FUNCTIONS.register(BY_KERNEL, attention_by_kernel)
        self.activity = _measured_activity(self.spark, self._spark_cache)

    def calls(self) -> dict[str, Call]:
        """One more token of each model, by the kernels of csrc/ (on a CPU) and by torch."""
        variants = {"kernels": True, "torch": False} if self.device.type == "cpu" else {"torch": False}
        models = (("dense", self.dense, self._dense_cache), ("spark", self.spark, self._spark_cache))
        return {
            f"{name}, {by}": partial(self._step, model, cache, by_kernel)
            for name, model, cache in models
            for by, by_kernel in variants.items()
        }

    @torch.inference_mode()
    def _step(self, model: NormfreeForCausalLM, cache: DynamicCache, by_kernel: bool) -> None:
        Linear.by_kernel = by_kernel
        if model is self.dense:
            model.config._attn_implementation = BY_KERNEL if by_kernel else "sdpa"
        token = torch.randint(self.sizes["vocab_size"], (1, 1), device=self.device)
        model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1)

    def bytes_read(self) -> dict[str, float]:
        """Bytes that each model has to read for a token."""
        width = self.dtype.itemsize
        sizes: dict[str, Any] = {"context_length": self.tokens, "bytes_per_weight": width, "bytes_per_cached": width}
        models = {"dense": self.dense, "spark": self.spark}
        return {name: total_bytes(decode_cost(model.config, **sizes)) for name, model in models.items()}


def _measure_model(models: _Models, rounds: int) -> dict[str, Any]:
    device = models.device
    with sparse_decode(models.spark, backend=BACKENDS[device.type]):
        calls = _with_graphs(models.calls(), 1) if device.type == "cuda" else models.calls()
        seconds = interleaved(calls, rounds, device, clock_of(device))
    read = models.bytes_read()
    return {
        "shape": {**models.sizes, "tokens": models.tokens, "n_inner": models.inner},
        "parameters": {"dense": models.dense.num_parameters(), "spark": models.spark.num_parameters()},
        "active_on_average": models.activity,
        "tokens_a_second": {name: round(1 / statistics.median(each), 2) for name, each in seconds.items()},
        "gigabytes_a_token": {name: round(n / 1e9, 3) for name, n in read.items()},
        "ideal": round(read["dense"] / read["spark"], 2),
        "times_faster": {
            WHAT_COMPUTES[by]: _ratio(seconds[f"dense, {by}"], seconds[f"spark, {by}"])
            for by in (name.removeprefix("dense, ") for name in calls if name.startswith("dense"))
        },
    }


@torch.inference_mode()
def _measured_activity(spark: NormfreeForCausalLM, cache: DynamicCache) -> dict[str, float]:
    """Mean share of active neurons and mean number of attended tokens in one step of the masked dense computation."""
    with SparsityProbe(spark) as probe:
        spark(input_ids=torch.zeros(1, 1, dtype=torch.long, device=spark.device), cache=cache)
    return {name: round(float(layers.mean()), 4) for name, layers in probe.by_layer().items()}


def _with_graphs(calls: dict[str, Call], n: int) -> dict[str, Call]:
    """Each variant ``n`` times in a row, launched kernel by kernel and as a captured CUDA graph."""

    def repeated(call: Call) -> None:
        for _ in range(n):
            call()

    launched: dict[str, Call] = {name: partial(repeated, call) for name, call in calls.items()}
    return launched | {f"{name}{GRAPH}": _captured(call) for name, call in launched.items()}


def _captured(call: Call) -> Call:
    """Replays the kernels of one call, on the tensors of that call: a cache is written at one place each time."""
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
    """True if both are CUDA graphs, or neither is."""
    return name.endswith(GRAPH) == other.endswith(GRAPH)


def _ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and the middle 80 % of them, to three significant digits."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    tenth = len(ratios) // 10
    median, low, high = (float(f"{x:.3g}") for x in (statistics.median(ratios), ratios[tenth], ratios[-1 - tenth]))
    return {"median": median, "middle_80_percent": [low, high]}
