"""What is measured, as JAX functions of secret arrays; public numbers are keyword arguments. Runs under the engine.

Shapes: x [T, width] for norms, activations and linear maps, [n_head, T, ...] inside attention.
"""

from math import pi, sqrt

import jax.numpy as jnp
from jax import lax

HIDDEN_SCORE = -1e4
"""Below every score: what a hidden position has where the maximum is taken."""


def linear(x, weight, bias=None):
    """x W + b; weight [n_in, n_out]."""
    y = x @ weight
    return y if bias is None else y + bias


def attention_scores(query, key):
    """Q Kᵀ, [n_head, T, T]; the factor 1/sqrt(head_dim) is in the weights of the queries."""
    return query @ key.transpose(0, 2, 1)


def softmax(scores):
    """Over the last axis of [n_head, T, T], with a causal mask, which is public.

    The engine's exponential, (1 + x / 256)^256, is wrong below -512: hidden scores never reach it.
    """
    visible = jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
    largest = jnp.where(visible, scores, HIDDEN_SCORE).max(axis=-1, keepdims=True)
    exponentials = jnp.where(visible, jnp.exp(jnp.where(visible, scores - largest, 0.0)), 0.0)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def attention_output(weights, value):
    """[n_head, T, T] times [n_head, T, head_dim]."""
    return weights @ value


def rotary(x, cos, sin):
    """Rotary positions; x [n_head, T, head_dim], public cos and sin [T, rotated]."""
    n_rotated = cos.shape[-1]
    turned, rest = x[..., :n_rotated], x[..., n_rotated:]
    first, second = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return jnp.concatenate([turned, rest], axis=-1)


def layernorm(x, gain, bias=None, *, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred * lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + eps) * gain
    return y if bias is None else y + bias


def rmsnorm(x, gain, *, eps):
    return x * lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * gain


def constant_scaling(x, gain, bias=None, *, is_centred):
    """A norm whose std is a constant that is divided into its gain."""
    y = (x - x.mean(axis=-1, keepdims=True) if is_centred else x) * gain
    return y if bias is None else y + bias


def dyt(x, alpha, gain, bias):
    """tanh(α x) gain + bias, with a secret α of shape [1]."""
    return jnp.tanh(alpha * x) * gain + bias


def gelu(x):
    return 0.5 * x * (1.0 + lax.erf(x * sqrt(0.5)))


def gelu_tanh(x):
    return 0.5 * x * (1.0 + jnp.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))


def gelu_piecewise(x):
    """PUMA's polynomials (Dong et al., 2023, Section 4.1), within 0.02 of GELU; 0 below -4 and x above 3."""
    square = x * x
    cube = square * x
    left = -0.011034134030615728 * cube - 0.11807612951181953 * square - 0.42226581151983866 * x - 0.5054031199708174
    right = (
        0.0018067462606141187 * cube * cube
        - 0.037688200365904236 * square * square
        + 0.3603292692789629 * square
        + 0.5 * x
        + 0.008526321541038084
    )
    above_left, above_middle, above_right = (
        jnp.where(condition, 1.0, 0.0) for condition in (x >= -4.0, x >= -1.95, x > 3.0)
    )
    return (above_left - above_middle) * left + (above_middle - above_right) * right + above_right * x


def relu(x):
    return jnp.maximum(x, 0.0)


def leaky_relu(x, *, negative_slope):
    return jnp.where(x > 0, x, negative_slope * x)


def learnable_leaky_relu(x, negative_slope):
    """With a secret slope of shape [1]."""
    return jnp.where(x > 0, x, negative_slope * x)


def silu(x):
    return x / (1.0 + jnp.exp(-x))


def relu_squared(x):
    y = jnp.maximum(x, 0.0)
    return y * y


def statistical_topk(x, *, quantile):
    """max(x - mean - quantile std, 0) over the last axis: Spark's threshold."""
    centred = x - x.mean(axis=-1, keepdims=True)
    std = jnp.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    return jnp.maximum(centred - quantile * std, 0.0)


def multiply(x, y):
    return x * y


OPERATIONS = {
    function.__name__: function
    for function in (
        linear,
        attention_scores,
        softmax,
        attention_output,
        rotary,
        layernorm,
        rmsnorm,
        constant_scaling,
        dyt,
        gelu,
        gelu_tanh,
        gelu_piecewise,
        relu,
        leaky_relu,
        learnable_leaky_relu,
        silu,
        relu_squared,
        statistical_topk,
        multiply,
    )
}
