# ruff: noqa: N803 (the paper's names of matrices)
"""Spark FFN and attention in float64 NumPy: everything computed, then masked. The reference of the sparse kernels."""

import math

import numpy as np
from scipy.stats import norm


def array(x):
    return x.double().cpu().numpy()


def gelu(x):
    return x * norm.cdf(x)


def feed_forward(q, K1, K2, V, *, k, predictor_bias=None, rest_bias=None, activation=gelu):
    """[n, d] and the number of active neurons of each query."""
    q, K1, K2, V = (array(each) for each in (q, K1, K2, V))
    r, n_inner = K1.shape
    scores = q[:, :r] @ K1 + (0 if predictor_bias is None else array(predictor_bias))
    if k == n_inner:
        excess, active = scores, np.ones_like(scores, dtype=bool)
    else:
        theta = scores.mean(-1, keepdims=True) + scores.std(-1, keepdims=True) * norm.ppf(1 - k / n_inner)
        excess, active = np.maximum(scores - theta, 0), scores > theta
    multipliers = q[:, r:] @ K2 + (0 if rest_bias is None else array(rest_bias))
    return (activation(excess) * multipliers) @ V, active.sum(-1)


def attention(q, predictor_keys, rest_keys, values, *, k, predictor_scale, rest_scale, visible=None):
    """[batch, n_head, value_dim], the number of kept tokens, and how far the nearest score is from its threshold."""
    q, predictor_keys, rest_keys, values = (array(each) for each in (q, predictor_keys, rest_keys, values))
    batch, n_head, _ = q.shape
    group, r = n_head // predictor_keys.shape[1], predictor_keys.shape[-1]
    out = np.empty((batch, n_head, values.shape[-1]))
    counts, margin = np.empty((batch, n_head), dtype=int), math.inf
    for b in range(batch):
        seen = np.arange(values.shape[2]) if visible is None else np.flatnonzero(visible[b].cpu().numpy())
        for h in range(n_head):
            scores = predictor_keys[b, h // group, seen] @ q[b, h, :r] * predictor_scale
            kept = np.ones_like(scores, dtype=bool)
            count = k * len(seen) if isinstance(k, float) else k
            if count < len(seen):
                theta = scores.mean() + scores.std() * norm.ppf(1 - count / len(seen))
                kept = (scores > theta) | (scores == scores.max())
                margin = min(margin, np.abs(scores - theta).min())
            weights = np.where(kept, np.exp(scores - scores.max()), 0.0)
            gates = np.logaddexp(0, rest_keys[b, h // group, seen] @ q[b, h, r:] * rest_scale)
            out[b, h] = (weights / weights.sum() * gates) @ values[b, h // group, seen]
            counts[b, h] = kept.sum()
    return out, counts, margin
