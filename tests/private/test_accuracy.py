"""What the engine computes, in its in-memory simulator, against float64 NumPy and the plain models in float64."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree_private.environment import ENGINE_FOLDER, Engine
from normfree_private.export import engine_config, model_weights, one_hot, public_tables

pytestmark = pytest.mark.engine

PROTOCOLS = {"SEMI2K": 2, "ABY3": 3}
DRAW = np.random.default_rng(0)
X = np.concatenate([np.linspace(-8, 8, 48)[None], 1.5 * DRAW.normal(size=(5, 48))]).astype(np.float32)
GAIN, BIAS = DRAW.normal(size=(2, 48)).astype(np.float32)
SCORES = 4 * DRAW.normal(size=(2, 12, 12)).astype(np.float32)
HEADS = DRAW.normal(size=(2, 12, 8)).astype(np.float32)
ALPHA = np.array([0.5], dtype=np.float32)
ANGLES = np.arange(12)[:, None] * np.array([1.0, 0.1])[None]
COS, SIN = (np.tile(table, 2).astype(np.float32) for table in (np.cos(ANGLES), np.sin(ANGLES)))

erf = np.vectorize(math.erf)


@dataclass(frozen=True)
class Case:
    """An operation on float32 arrays, the same in float64, and how far the engine's approximation may be from it."""

    operation: str
    inputs: tuple[Any, ...]
    expected: Callable[..., Any]
    tolerance: float
    options: dict[str, Any] = field(default_factory=dict)
    public: dict[str, Any] = field(default_factory=dict)


def standardized(x: Any, *, eps: float = 1e-5) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def causal_softmax(scores: Any) -> Any:
    hidden = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    exponentials = np.exp(hidden - hidden.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def rotated(x: Any) -> Any:
    """Pairs (i, i + 2) of the first four dimensions as complex numbers, turned by their angles."""
    turned = (x[..., :2] + 1j * x[..., 2:4]) * np.exp(1j * ANGLES)
    return np.concatenate([turned.real, turned.imag, x[..., 4:]], axis=-1)


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


CASES = {
    "linear": Case("linear", (X, X[:4].T.copy(), BIAS[:4]), lambda x, w, b: x @ w + b, 1e-3),
    "scores": Case("attention_scores", (HEADS, HEADS[:, ::-1].copy()), lambda q, k: q @ k.swapaxes(1, 2), 2e-4),
    "softmax": Case("softmax", (SCORES,), causal_softmax, 5e-3),
    "far softmax": Case("softmax", (15 * SCORES,), causal_softmax, 5e-3),
    "output": Case("attention_output", (SCORES, HEADS), lambda p, v: p @ v, 5e-4),
    "rotary": Case("rotary", (HEADS,), rotated, 2e-4, public={"cos": COS, "sin": SIN}),
    "layernorm": Case(
        "layernorm", (X, GAIN, BIAS), lambda x, g, b: standardized(x) * g + b, 3e-3, options={"eps": 1e-5}
    ),
    "rmsnorm": Case(
        "rmsnorm",
        (X, GAIN),
        lambda x, g: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * g,
        3e-3,
        options={"eps": 1e-5},
    ),
    "constant": Case(
        "constant_scaling",
        (X, GAIN, BIAS),
        lambda x, g, b: (x - x.mean(-1, keepdims=True)) * g + b,
        2e-4,
        options={"is_centred": True},
    ),
    "dyt": Case("dyt", (X, ALPHA, GAIN, BIAS), lambda x, a, g, b: np.tanh(a * x) * g + b, 2e-2),
    "gelu": Case("gelu", (X,), gelu, 2e-3),
    "gelu tanh": Case(
        "gelu_tanh", (X,), lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), 2e-2
    ),
    "gelu piecewise": Case("gelu_piecewise", (X,), gelu, 2e-2),
    "silu": Case("silu", (X,), lambda x: x / (1 + np.exp(-x)), 5e-3),
    "relu": Case("relu", (X,), lambda x: np.maximum(x, 0), 5e-5),
    "relu squared": Case("relu_squared", (X,), lambda x: np.maximum(x, 0) ** 2, 2e-4),
    "leaky": Case("leaky_relu", (X,), lambda x: np.where(x > 0, x, 0.1 * x), 1e-4, options={"negative_slope": 0.1}),
    "learnable": Case("learnable_leaky_relu", (X, ALPHA), lambda x, a: np.where(x > 0, x, a * x), 1e-4),
    "spark": Case(
        "statistical_topk",
        (X,),
        lambda x: np.maximum(x - x.mean(-1, keepdims=True) - 1.4 * x.std(-1, keepdims=True), 0),
        1e-3,
        options={"quantile": 1.4},
    ),
    "multiply": Case("multiply", (X, X[::-1].copy()), lambda x, y: x * y, 3e-4),
}
SMALL: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 16,
    "n_positions": 12,
    "vocab_size": 24,
    "initializer_range": 0.3,
}
MODELS = {
    "SM+LN+G": NormfreeConfig(**SMALL, attention_bias="qk", mlp_bias=False),
    "SM+LN+R": NormfreeConfig(**SMALL, attention_bias="qk", mlp_bias=False, activation="relu"),
    "SM+G": NormfreeConfig(**SMALL, attention_bias="qk", mlp_bias=False, norm="none"),
    "SM+R": NormfreeConfig(**SMALL, attention_bias="qk", mlp_bias=False, norm="none", activation="relu"),
    "llama": NormfreeConfig(
        **SMALL, norm="rmsnorm", final_norm="rmsnorm", ffn="gated", activation="silu", position="rotary", n_kv_head=2
    ),
    "neox": NormfreeConfig(
        **SMALL, position="rotary", rope_parameters={"partial_rotary_factor": 0.5}, parallel_residual=True
    ),
    "constant std": NormfreeConfig(
        **SMALL, norm="constant_std", final_norm="constant_std", activation=["relu", "learnable_leaky_relu"]
    ),
    "post dyt": NormfreeConfig(**SMALL, norm="dyt", final_norm="dyt", norm_placement="post", activation="leaky_relu"),
    "scaled": NormfreeConfig(**SMALL, norm="layernorm_scaling", activation="relu_squared", tie_word_embeddings=False),
}
LOGIT_TOLERANCE = 0.03


def model_of(name: str) -> NormfreeForCausalLM:
    """Random, with noise on what starts as zeros and ones."""
    torch.manual_seed(0)
    model = NormfreeForCausalLM(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("std"):
                buffer.uniform_(0.5, 2.0)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(24, (12,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def results(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The engine's result of each case and model, by ``PROTOCOL-NAME``: one process computes them all."""
    folder = tmp_path_factory.mktemp("simulated")
    jobs = []
    for name, case in CASES.items():
        np.savez(folder / f"{name}.npz", **{f"input{i}": each for i, each in enumerate(case.inputs)})
        np.savez(folder / f"{name}.public.npz", **case.public)
        jobs.append((name, {"kind": "operation", "operation": case.operation, "options": case.options}))
    for name in MODELS:
        model = model_of(name)
        weights: dict[str, Any] = model_weights(model, 12)
        public: dict[str, Any] = public_tables(model, 12)
        np.savez(folder / f"{name}.npz", tokens=one_hot(tokens(), 24), **weights)
        np.savez(folder / f"{name}.public.npz", **public)
        jobs.append((name, {"kind": "model", "config": engine_config(model.config)}))
    everything = [(name, protocol, n, program) for protocol, n in PROTOCOLS.items() for name, program in jobs]
    (folder / "jobs.json").write_text(json.dumps(everything))
    script = Path(__file__).parent / "simulate.py"
    answer = subprocess.run(
        [str(engine.python), str(script), str(ENGINE_FOLDER), str(folder)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return {path.stem: np.load(path).astype(np.float64) for path in folder.glob("*.npy")}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CASES)
def test_operations(results: dict[str, Any], name: str, protocol: str) -> None:
    case = CASES[name]
    expected = case.expected(*(each.astype(np.float64) for each in case.inputs))
    np.testing.assert_allclose(results[f"{protocol}-{name}"], expected, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(results: dict[str, Any], name: str, protocol: str) -> None:
    with torch.no_grad():
        logits = model_of(name).double()(tokens().unsqueeze(0)).logits[0].numpy()
    assert logits.std() > 5 * LOGIT_TOLERANCE
    np.testing.assert_allclose(results[f"{protocol}-{name}"], logits, rtol=0, atol=LOGIT_TOLERANCE)
