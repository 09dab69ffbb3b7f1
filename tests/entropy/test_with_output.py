"""attention_and_entropy as two calls: the output against float64 NumPy, the entropy against attention_entropy."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from normfree.entropy import attention_and_entropy, attention_entropy
from normfree.errors import InputError

from .numpy_entropy import EPS32, scores_of
from .test_fused import attention_cases


def attention_of(scores, allowed, v):
    """Float64 [batch, n_head, n_query, value_dim]; zeros where nothing is visible."""
    scores = np.where(allowed, scores, -np.inf)
    with np.errstate(all="ignore"):
        p = np.nan_to_num(np.exp(scores - scores.max(-1, keepdims=True)))
        p = np.nan_to_num(p / p.sum(-1, keepdims=True))
    return p @ np.repeat(v.double().numpy(), scores.shape[1] // v.shape[1], axis=1)


@settings(max_examples=100, deadline=None)
@given(case=attention_cases(magnitudes=(-1.0, 1.0)))
def test_output_agrees_with_float64_numpy(case):
    q, k, options, allowed, bias = case
    v = torch.randn(*k.shape[:3], 7, generator=torch.Generator().manual_seed(0)).to(q.dtype)
    output, entropy = attention_and_entropy(q, k, v, **options)
    assert torch.equal(entropy.nan_to_num(-1), attention_entropy(q, k, **options).nan_to_num(-1))
    assert output.dtype == q.dtype
    scores = scores_of(q, k, q.shape[-1] ** -0.5) + np.asarray(bias)
    # torch's own attention rounds scores and weights to the inputs' precision on some paths
    eps = torch.finfo(q.dtype).eps if q.dtype != torch.float32 else 10 * EPS32
    seen = np.where(np.broadcast_to(allowed, scores.shape), np.abs(scores), 0.0)
    most = 4 * eps * (1 + seen.max()) * float(v.abs().max())
    np.testing.assert_allclose(output.double().numpy(), attention_of(scores, allowed, v), rtol=0, atol=most)


@pytest.mark.parametrize("window", [None, 5])
def test_both_results_have_gradients(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    function = partial(attention_and_entropy, sliding_window=window, backend="reference")
    assert torch.autograd.gradcheck(lambda *inputs: function(*inputs)[0], (q, k, v))
    output, entropy = attention_and_entropy(q, k, v, sliding_window=window)
    *of_both, of_v = torch.autograd.grad(output.sum() + entropy.sum(), (q, k, v))
    of_entropy = torch.autograd.grad(attention_entropy(q, k, sliding_window=window).sum(), (q, k))
    for both, alone in zip(of_both, of_entropy, strict=True):
        from_output = both - alone
        assert from_output.abs().max() > 1e-3
    assert of_v.abs().sum() > 0


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.randn(1, 2, 5, 8), r"v must be \[batch, n_kv_head, n_key, value_dim\] = \[1, 2, 4, 'value_dim'\]"),
        (torch.randn(2, 4, 8), "v must be"),
        (torch.randn(1, 2, 4, 8, dtype=torch.float64), "must have one dtype"),
        (torch.randn(1, 2, 4, 8, device="meta"), "be on one device"),
    ],
)
def test_bad_values_are_named(v, message):
    with pytest.raises(InputError, match=message):
        attention_and_entropy(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), v)
