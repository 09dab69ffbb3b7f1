"""The decoder in float64 NumPy, written from the equations and from no code under test.

Shapes: x [T, n_embd] is one sequence; weights are a model's state dict as float64 arrays, W [out, in].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf, expit

from normfree import NormfreeConfig, NormfreeForCausalLM

Array = NDArray[np.float64]
Weights = dict[str, Array]

ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "gelu": lambda x, _: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x, _: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x, _: np.maximum(x, 0),
    "leaky_relu": lambda x, slope: np.maximum(x, 0) + slope * np.minimum(x, 0),
    "learnable_leaky_relu": lambda x, slope: np.maximum(x, 0) + slope * np.minimum(x, 0),
    "silu": lambda x, _: x * expit(x),
    "relu_squared": lambda x, _: np.maximum(x, 0) ** 2,
}


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}


def perturb(model: NormfreeForCausalLM, std: float = 0.2) -> NormfreeForCausalLM:
    """The model with noise on every parameter, so that no bias is zero, no gain one, no attention uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def constant_norm(weights: Weights, prefix: str, x: Array, is_centered: bool, place: int = 0) -> Array:
    """Division by the constant std number ``place``."""
    centred = x - x.mean(-1, keepdims=True) if is_centered else x
    std = weights[f"{prefix}.std"][place]
    return weights[f"{prefix}.weight"] * centred / std + weights.get(f"{prefix}.bias", 0.0)


def constant_head_norm(config: NormfreeConfig, weights: Weights, prefix: str, x: Array, head: int) -> Array:
    """x [T, head_dim] of one head by its own constant std; the gains may be its own too."""
    kind = config.qk_norm if config.qk_norm != "none" else "layernorm" if config.norm_is_centered else "rmsnorm"
    gain, std = weights[f"{prefix}.weight"], weights[f"{prefix}.std"][0]
    if kind in ("layernorm_per_head", "rmsnorm_full_width"):
        gain = gain.reshape(-1, config.head_dim)[head]
    centred = x - x.mean(-1, keepdims=True) if kind.startswith("layernorm") else x
    return gain * centred / std[head if len(std) > 1 else 0] + weights.get(f"{prefix}.bias", 0.0)


def norm(name: str, weights: Weights, prefix: str, eps: float, x: Array, layer: int | None = None) -> Array:
    """``layer`` counts from 0."""
    if name == "none":
        return x
    if name.endswith("_scaling"):
        assert layer is not None
        return norm(name.removesuffix("_scaling"), weights, prefix, eps, x) / np.sqrt(layer + 1)
    gain = weights[f"{prefix}.weight"]
    if name == "dyt":
        return gain * np.tanh(weights[f"{prefix}.alpha"].item() * x) + weights[f"{prefix}.bias"]
    if name == "derf":
        shifted = weights[f"{prefix}.alpha"].item() * x + weights[f"{prefix}.shift"].item()
        return gain * erf(shifted) + weights[f"{prefix}.bias"]
    if name == "rmsnorm":
        return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    assert name == "layernorm"
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return gain * centred / np.sqrt(variance + eps) + weights[f"{prefix}.bias"]


def linear(weights: Weights, prefix: str, x: Array) -> Array:
    return x @ weights[f"{prefix}.weight"].T + weights.get(f"{prefix}.bias", 0.0)


def capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def rotate(x: Array, theta: float, fraction: float) -> Array:
    """Rotary positions: pair (j, j + d/2) of the first d = fraction * head_dim turns by m * theta^(-2j/d)."""
    turned = x.copy()
    d = int(x.shape[-1] * fraction)
    for m in range(len(x)):
        for j in range(d // 2):
            angle = m * theta ** (-2 * j / d)
            a, b = x[m, j], x[m, j + d // 2]
            turned[m, j] = a * np.cos(angle) - b * np.sin(angle)
            turned[m, j + d // 2] = b * np.cos(angle) + a * np.sin(angle)
    return turned


def attention(
    config: NormfreeConfig, weights: Weights, prefix: str, x: Array, value_input: Array | None = None
) -> Array:
    """Causal softmax attention, head by head and query by query; values may read something else than the others."""
    read = {"q": x, "k": x, "v": x if value_input is None else value_input}
    query, key, value = (linear(weights, f"{prefix}.{each}_proj", read[each]) for each in "qkv")

    width = config.head_dim
    if config.qk_norm == "rmsnorm_full_width" and not config.qk_norm_is_constant:
        query = norm("rmsnorm", weights, f"{prefix}.q_norm", config.norm_eps, query)
        key = norm("rmsnorm", weights, f"{prefix}.k_norm", config.norm_eps, key)

    def normalized(projection: str, x: Array, head: int) -> Array:
        is_hybrid = config.norm_placement.startswith("hybrid")
        if (config.qk_norm_is_constant and projection in "qk") or (is_hybrid and config.norm == "constant_std"):
            return constant_head_norm(config, weights, f"{prefix}.{projection}_norm", x, head)
        if config.qk_norm == "rmsnorm_full_width":
            return x
        if config.qk_norm == "layernorm_per_head" and projection in "qk":
            gain = {
                "n.weight": weights[f"{prefix}.{projection}_norm.weight"].reshape(-1, width)[head],
                "n.bias": np.zeros(1),
            }
            return norm("layernorm", gain, "n", config.norm_eps, x)
        name = config.norm if is_hybrid else config.qk_norm if projection in "qk" else "none"
        return norm(name, weights, f"{prefix}.{projection}_norm", config.norm_eps, x)

    heads = []
    for head in range(config.n_head):
        shared = head * config.n_kv_head // config.n_head
        q = normalized("q", query[:, head * width : (head + 1) * width], head)
        k = normalized("k", key[:, shared * width : (shared + 1) * width], shared)
        v = normalized("v", value[:, shared * width : (shared + 1) * width], shared)
        if config.position == "rotary":
            theta = config.rope_parameters["rope_theta"]
            fraction = config.rope_parameters.get("partial_rotary_factor", 1.0)
            q, k = rotate(q, theta, fraction), rotate(k, theta, fraction)
        rows = []
        for i in range(len(x)):
            scale = 1 / np.sqrt(width) if config.attention_scale is None else config.attention_scale
            weight = np.exp(capped(k[: i + 1] @ q[i] * scale, config.attn_logit_softcapping))
            rows.append(weight / weight.sum() @ v[: i + 1])
        heads.append(np.array(rows))
    return linear(weights, f"{prefix}.o_proj", np.concatenate(heads, axis=-1))


def feed_forward(config: NormfreeConfig, weights: Weights, prefix: str, layer: int, x: Array) -> Array:
    name = config.activations[layer]
    slope = config.negative_slope or 0.0
    if name == "learnable_leaky_relu":
        slope = weights[f"{prefix}.activation.negative_slope"].item()
    up = linear(weights, f"{prefix}.up_proj", x)
    if config.ffn == "gated":
        hidden = ACTIVATIONS[name](linear(weights, f"{prefix}.gate_proj", x), slope) * up
    else:
        hidden = ACTIVATIONS[name](up, slope)
    return linear(weights, f"{prefix}.down_proj", hidden)


def block(config: NormfreeConfig, weights: Weights, prefix: str, layer: int, x: Array) -> Array:
    def attend(x: Array, value_input: Array | None = None) -> Array:
        return attention(config, weights, f"{prefix}attention", x, value_input)

    def normed_attend(x: Array) -> Array:
        """Attention behind its norm, which has two constant stds."""
        if config.norm != "constant_std":
            return attend(norm_1(x))
        readings = [
            constant_norm(weights, f"{prefix}attention_norm", x, config.norm_is_centered, place) for place in (0, 1)
        ]
        return attend(*readings)

    def ffn(x: Array) -> Array:
        return feed_forward(config, weights, f"{prefix}ffn", layer, x)

    def norm_of(name: str, x: Array) -> Array:
        if config.norm == "constant_std":
            return constant_norm(weights, f"{prefix}{name}", x, config.norm_is_centered)
        return norm(config.norm, weights, f"{prefix}{name}", config.norm_eps, x, layer)

    def norm_1(x: Array) -> Array:
        return norm_of("attention_norm", x)

    def norm_2(x: Array) -> Array:
        return norm_of("ffn_norm", x)

    placement = config.norm_placement
    if placement == "mix":
        assert config.n_post_layer is not None
        placement = "post" if layer < config.n_post_layer else "pre"
    if placement == "hybrid_star":
        placement = "pre" if layer == 0 else "hybrid"
    if config.parallel_residual:
        return x + normed_attend(x) + ffn(norm_2(x))
    if placement == "pre":
        h = x + normed_attend(x)
        return h + ffn(norm_2(h))
    if placement == "post":
        h = norm_1(x + attend(x))
        return norm_2(h + ffn(h))
    if placement == "sandwich":
        h = x + norm_of("attention_output_norm", normed_attend(x))
        return h + norm_of("ffn_output_norm", ffn(norm_2(h)))
    if placement == "reordered":
        h = x + norm_1(attend(x))
        return h + norm_2(ffn(h))
    if placement == "deepnorm":
        alpha = (2 * config.n_layer) ** (1 / 4)
        h = norm_1(alpha * x + attend(x))
        return norm_2(alpha * h + ffn(h))
    assert placement == "hybrid"
    h = x + attend(x)
    return norm_2(h) + ffn(norm_2(h))


def logits(config: NormfreeConfig, weights: Weights, input_ids: NDArray[np.int64]) -> Array:
    """Next-token logits [T, vocab_size] of one sequence of token ids [T]."""
    x = weights["model.embed_tokens.weight"][input_ids] * (config.embedding_multiplier or 1.0)
    if config.position == "learned":
        x = x + weights["model.embed_positions.weight"][: len(input_ids)]
    if config.scale_embeddings:
        x = x * weights["model.embedding_scale"]
    for layer in range(config.n_layer):
        x = block(config, weights, f"model.blocks.{layer}.", layer, x)
    if config.final_norm == "constant_std":
        x = constant_norm(weights, "model.final_norm", x, bool(config.final_norm_is_centered))
    else:
        x = norm(config.final_norm, weights, "model.final_norm", config.norm_eps, x)
    return capped(x @ weights["lm_head.weight"].T, config.final_logit_softcapping)


def loss(config: NormfreeConfig, weights: Weights, input_ids: NDArray[np.int64]) -> float:
    """Mean next-token cross-entropy in nats of one sequence of token ids [T]."""
    scores = logits(config, weights, input_ids)[:-1]
    log_partition = np.log(np.exp(scores).sum(-1))
    return float((log_partition - scores[np.arange(len(scores)), input_ids[1:]]).mean())
