"""Attention entropy in float64 NumPy, written from the definition, and the tolerance that float32 can be held to."""

import numpy as np
import torch

EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)


def visible(n_query, n_key, is_causal, sliding_window):
    """Bool [n_query, n_key] by two loops; the queries are the last positions."""
    mask = np.zeros((n_query, n_key), dtype=bool)
    for i in range(n_query):
        position = i + n_key - n_query
        for j in range(n_key):
            causal = j <= position or not is_causal
            near = sliding_window is None or abs(position - j) < sliding_window
            mask[i, j] = causal and near
    return mask


def scores_of(q, k, scale, softcap=None):
    """Float64 [batch, n_head, n_query, n_key]."""
    q, k = q.detach().double().numpy(), k.detach().double().numpy()
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("bhid,bhjd->bhij", q, k) * scale
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def weights_of(scores, mask, sinks=None):
    """Softmax [batch, n_head, n_query, n_key] over the keys that ``mask`` (bool, broadcastable) leaves, NaN where it
    leaves none. ``sinks``, broadcastable to [batch, n_head, n_query], have one more column, the last.
    """
    mask = np.broadcast_to(mask, scores.shape)
    masked = np.where(mask, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, dtype=np.float64), scores.shape[:3])[..., None]
        masked = np.concatenate([masked, np.where(mask.any(-1, keepdims=True), sink, -np.inf)], axis=-1)
    with np.errstate(all="ignore"):
        p = np.exp(masked - masked.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)


def entropy_of(scores, mask, sinks=None):
    """[batch, n_head, n_query] nats; NaN where ``mask`` (bool, broadcastable) leaves nothing."""
    p = weights_of(scores, mask, sinks)
    terms = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1.0)), 0.0)
    return np.where(np.broadcast_to(mask, scores.shape).any(-1), terms.sum(-1), np.nan)


def lengths(q, k):
    """max|q_i| and max|k_j - mean k|."""
    q, k = q.detach().double(), k.detach().double()
    return float(q.norm(dim=-1).max()), float((k - k.mean(2, keepdim=True)).norm(dim=-1).max())


def tolerance(q, k, scale, bias=0.0):
    """4 · eps32 · (1 + scale · max|q_i| · max|k_j - mean k| + max|bias|), in nats: what the docstring promises."""
    q_length, k_length = lengths(q, k)
    return 4 * EPS32 * (1 + abs(scale) * q_length * k_length + float(torch.as_tensor(bias).abs().max()))


def gradient_tolerances(q, k, scale, bias, weight, gradients):
    """For the gradients in q and k of Σ weight · entropy, the largest norm that their errors may have.

    1e-5 of the gradient, and where its terms cancel, the error of the entropy times what it is multiplied with; and the
    same in float64 for ``gradients`` themselves, which come from keys that are not centred.
    """
    q_length, k_length = lengths(q, k)
    whole_k_length = float(k.detach().double().norm(dim=-1).max())
    absolute = tolerance(q, k, scale, bias) * abs(scale) * float(weight.norm())
    exact = 4 * EPS64 * (1 + abs(scale) * q_length * whole_k_length) * abs(scale) * float(weight.norm())
    return [
        1e-5 * float(gradients[0].norm()) + absolute * k_length + exact * whole_k_length,
        1e-5 * float(gradients[1].norm()) + absolute * q_length + exact * q_length,
    ]
