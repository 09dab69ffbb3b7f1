"""Sparse decode against dense: the FFN alone, and tokens a second of a whole model, at Gemma-2 2B's shapes.

    python benchmarks/spark_decode.py ffn --dtype fp32 --threads 1
    python benchmarks/spark_decode.py model --dtype bf16 --threads 2 --layers 26

Random weights; several layers take turns, so that none stays in a cache; every call has new inputs. Variants take turns
in one process, and ratios are of the same round: their median and the middle 80 % of rounds. Every dense variant runs
twice, by torch and by kernels that are written like the sparse ones and differ in the rows they read (csrc/). The
"ideal" is the ratio of the bytes that have to be read. One thread is timed by the processor time that it takes, several
by the clock on the wall, for which the machine has to be otherwise idle. Prints JSON; writes it with --out.

    ffn      one query through a feed-forward network. spark: n_inner 9216, 8 % of it active, r = d/2; against the dense
             network of as many parameters (two matrices), and against the gated one of Gemma-2 (three; 1.5 times the
             parameters)
    model    one more token behind --tokens tokens in the cache, everything included: the layers, the cache's growth,
             norms, the unembedding. spark: --inner neurons, at most 256 tokens attended to; against softmax attention
             and a gated network of 9216. The default --inner, 13824, gives both the same parameters, as in the paper
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.residual import ResidualProjection
from normfree.modeling.spark_cache import SparkCacheLayer
from normfree.modeling.spark_decode import sparse_decode
from normfree.modeling.spark_feedforward import SparkFeedForward
from normfree.modeling.sparsity_probe import SparsityProbe
from normfree.sparsity.accounting import decode_cost, total_bytes
from normfree.sparsity.decode import PackedFeedForward, decode_backends, sparse_feed_forward
from normfree.sparsity.decode.extension import all_dots, weighted_rows
from normfree.timing import Call, Clock, interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
D_MODEL, N_INNER, N_HEAD, N_KV_HEAD, HEAD_DIM = 2304, 9216, 8, 4, 256
ACTIVE, ATTENDED = 0.08, 256
CYCLED_LAYERS = 6
CPU = torch.device("cpu")
Measure = Callable[[], dict[str, Any]]
"""One measurement, with as many threads as are set."""


def clock() -> Clock:
    """Processor time for one thread, which other work on the machine does not lengthen; for more, the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and the middle 80 % of them."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    tenth = len(ratios) // 10
    return {
        "median": round(statistics.median(ratios), 2),
        "middle_80_percent": [round(ratios[tenth], 2), round(ratios[-1 - tenth], 2)],
    }


def random_matrix(*shape: int, dtype: torch.dtype) -> Tensor:
    """Of a normal distribution; large ones repeat a part of a prime length, which is quick to make."""
    part = (torch.randn(1_000_003) * 0.02).to(dtype)
    n = torch.Size(shape).numel()
    return part.repeat(-(-n // part.numel()))[:n].view(shape)


def ffn_benchmark(arguments: argparse.Namespace, dtype: torch.dtype) -> Measure:
    r, k = D_MODEL // 2, round(ACTIVE * N_INNER)

    def matrices(*shapes: tuple[int, int]) -> cycle[list[Tensor]]:
        return cycle([[random_matrix(*shape, dtype=dtype) for shape in shapes] for _ in range(CYCLED_LAYERS)])

    spark = matrices((r, N_INNER), (N_INNER, D_MODEL - r), (N_INNER, D_MODEL))
    rows = matrices((N_INNER, D_MODEL), (N_INNER, D_MODEL), (N_INNER, D_MODEL))

    def query() -> Tensor:
        return torch.randn(1, D_MODEL)

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
        return F.linear(F.gelu(F.linear(query().to(dtype), up)), down.view(D_MODEL, N_INNER))

    def torch_gated() -> Tensor:
        up, down, gate = next(rows)
        x = query().to(dtype)
        return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down.view(D_MODEL, N_INNER))

    calls: dict[str, Call] = {
        "spark, cpu": lambda: sparse("cpu"),
        "spark, torch": lambda: sparse("torch"),
        "dense, same kernel": dense,
        "dense, torch": torch_dense,
        "gated, same kernel": gated,
        "gated, torch": torch_gated,
    }

    def measure() -> dict[str, Any]:
        seconds = interleaved(calls, arguments.rounds, CPU, clock())
        dense_bytes = 2 * N_INNER * D_MODEL * dtype.itemsize
        spark_bytes = (N_INNER * r + k * (2 * D_MODEL - r)) * dtype.itemsize
        return {
            "shape": {"d_model": D_MODEL, "n_inner": N_INNER, "r": r, "active": k, "layers_cycled": CYCLED_LAYERS},
            "milliseconds": {name: round(1000 * statistics.median(each), 3) for name, each in seconds.items()},
            "gigabytes_a_second": {
                "spark, cpu": round(spark_bytes / 1e9 / statistics.median(seconds["spark, cpu"]), 1),
                "dense, same kernel": round(dense_bytes / 1e9 / statistics.median(seconds["dense, same kernel"]), 1),
            },
            "ideal": {"dense": round(dense_bytes / spark_bytes, 2), "gated": round(1.5 * dense_bytes / spark_bytes, 2)},
            "times_faster": {
                f"spark, {backend}, than {name}": ratio(seconds[name], seconds[f"spark, {backend}"])
                for backend in ("cpu", "torch")
                for name in calls
                if not name.startswith("spark")
            },
        }

    return measure


class Linear(nn.Linear):
    """``nn.Linear`` whose products with one row can be those of csrc/."""

    by_kernel = False

    def forward(self, x: Tensor) -> Tensor:
        if not Linear.by_kernel or x.shape[:-1].numel() > 1:
            return super().forward(x)
        return all_dots(self.weight, x.view(1, -1).float()).to(x.dtype).view(*x.shape[:-1], -1)


class RoomyLayer(DynamicLayer):
    """A cache that is appended to in place, where transformers' copies all of it in every step."""

    def fill(self, key: Tensor, value: Tensor) -> None:
        self.length = key.shape[2]
        room = (0, 0, 0, 2048)
        self.buffers = [F.pad(key, room), F.pad(value, room)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length] = new[:, :, 0]
        self.length += 1
        key, value = (buffer[:, :, : self.length] for buffer in self.buffers)
        return key, value

    def get_seq_length(self) -> int:
        return self.length


def attention_by_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention of one query that sees every key, by the dense products of csrc/."""
    heads = []
    for q, k, v in zip(query[0].chunk(key.shape[1]), key[0], value[0], strict=True):
        weights = (all_dots(k, q[:, 0].float()) * module.scaling).softmax(-1)
        heads.append(weighted_rows(v, weights))
    return torch.cat(heads)[None, None].to(query.dtype), None


def built(config: NormfreeConfig, dtype: torch.dtype, embedding: Tensor) -> NormfreeForCausalLM:
    """The model with random weights, its embeddings shared with the other model's."""
    with torch.device("meta"):
        model = NormfreeForCausalLM(config).to(dtype)
    replaced: dict[str, Tensor] = {
        name: random_matrix(*weight.shape, dtype=dtype) if weight.dim() == 2 else torch.ones(weight.shape, dtype=dtype)
        for name, weight in model.named_parameters()
        if name != "model.embed_tokens.weight"
    }
    replaced |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    model.load_state_dict(replaced, assign=True)
    model.tie_weights()
    model.model.rotary_embedding = type(model.model.rotary_embedding)(config)
    for module in [model.lm_head, *model.modules()]:
        # the sparse decode has kernels of its own for the layers of a Spark network
        if type(module) in (nn.Linear, ResidualProjection) and module not in spark_projections(model):
            module.__class__ = Linear
    return model.eval().requires_grad_(False)


def spark_projections(model: NormfreeForCausalLM) -> set[nn.Module]:
    networks = [module for module in model.modules() if isinstance(module, SparkFeedForward)]
    return {projection for network in networks for projection in network.children()}


def filled_cache(model: NormfreeForCausalLM, n_token: int, dtype: torch.dtype) -> DynamicCache:
    """A cache of random keys and values, and room for more."""
    cache = DynamicCache()
    for _ in range(model.config.n_layer):
        key, value = (50 * random_matrix(1, N_KV_HEAD, n_token, HEAD_DIM, dtype=dtype) for _ in range(2))
        if model.config.attention == "spark":
            cache.layers.append(SparkCacheLayer(HEAD_DIM // 2))
            cache.layers[-1].append(key, value)
        else:
            cache.layers.append(RoomyLayer())
            cache.layers[-1].fill(key, value)
    return cache


@torch.inference_mode()
def measured_activity(spark: NormfreeForCausalLM, cache: DynamicCache) -> dict[str, float]:
    """Mean share of active neurons and mean number of attended tokens in one step of the masked dense computation."""
    with SparsityProbe(spark) as probe:
        spark(input_ids=torch.zeros(1, 1, dtype=torch.long), cache=cache)
    return {name: round(float(layers.mean()), 4) for name, layers in probe.by_layer().items()}


def model_benchmark(arguments: argparse.Namespace, dtype: torch.dtype) -> Measure:
    sizes: dict[str, Any] = {
        "n_layer": arguments.layers,
        "n_embd": D_MODEL,
        "n_head": N_HEAD,
        "n_kv_head": N_KV_HEAD,
        "head_dim": HEAD_DIM,
        "n_positions": arguments.tokens + 4096,
        "vocab_size": arguments.vocabulary,
        "norm": "rmsnorm",
        "final_norm": "rmsnorm",
        "position": "rotary",
        "activation": "gelu_tanh",
        "attention_bias": "none",
        "mlp_bias": False,
    }
    embedding = random_matrix(arguments.vocabulary, D_MODEL, dtype=dtype)
    dense = built(NormfreeConfig(**sizes, ffn="gated", n_inner=N_INNER), dtype, embedding)
    spark_options = {"ffn_active": ACTIVE, "attention_active": ATTENDED, "n_inner": arguments.inner}
    spark = built(NormfreeConfig(**sizes, ffn="spark", attention="spark", **spark_options), dtype, embedding)
    dense_cache, spark_cache = (filled_cache(model, arguments.tokens, dtype) for model in (dense, spark))
    ALL_ATTENTION_FUNCTIONS.register("by_kernel", attention_by_kernel)
    activity = measured_activity(spark, spark_cache)

    @torch.inference_mode()
    def step(model: NormfreeForCausalLM, cache: DynamicCache, by_kernel: bool) -> None:
        Linear.by_kernel = by_kernel
        if model is dense:
            model.config._attn_implementation = "by_kernel" if by_kernel else "sdpa"
        token = torch.randint(arguments.vocabulary, (1, 1))
        model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1)

    calls: dict[str, Call] = {
        f"{name}, {'kernels' if by_kernel else 'torch'}": partial(step, model, cache, by_kernel)
        for name, model, cache in (("dense", dense, dense_cache), ("spark", spark, spark_cache))
        for by_kernel in (True, False)
    }

    def measure() -> dict[str, Any]:
        with sparse_decode(spark, backend="cpu"):
            seconds = interleaved(calls, arguments.rounds, CPU, clock())
        width = dtype.itemsize
        read = {
            name: total_bytes(
                decode_cost(
                    model.config, context_length=arguments.tokens, bytes_per_weight=width, bytes_per_cached=width
                )
            )
            for name, model in (("dense", dense), ("spark", spark))
        }
        return {
            "shape": {
                name: sizes[name] for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "vocab_size")
            }
            | {"tokens": arguments.tokens, "n_inner": {"gated": N_INNER, "spark": arguments.inner}},
            "parameters": {"dense": dense.num_parameters(), "spark": spark.num_parameters()},
            "active_on_average": activity,
            "tokens_a_second": {name: round(1 / statistics.median(each), 2) for name, each in seconds.items()},
            "gigabytes_a_token": {name: round(n / 1e9, 3) for name, n in read.items()},
            "ideal": round(read["dense"] / read["spark"], 2),
            "times_faster": {
                "everything by kernels": ratio(seconds["dense, kernels"], seconds["spark, kernels"]),
                "sparse layers by kernels, the rest by torch": ratio(seconds["dense, torch"], seconds["spark, torch"]),
            },
        }

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ffn", "model"))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--inner", type=int, default=13_824)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    reason = decode_backends()["cpu"]
    if reason is not None:
        sys.exit(f"the compiled kernels cannot be used: {reason}")
    torch.manual_seed(0)
    random.seed(0)
    benchmark = ffn_benchmark if arguments.what == "ffn" else model_benchmark
    prepared = benchmark(arguments, DTYPES[arguments.dtype])
    results = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        results[f"{threads} threads, {clock().__name__}"] = prepared()
    result = {
        "command": " ".join(["python benchmarks/spark_decode.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": arguments.dtype,
    } | results
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
