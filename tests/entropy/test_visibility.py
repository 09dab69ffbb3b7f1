"""Which keys a query sees, against masks written out in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.entropy import visibility as visibility_module
from normfree.entropy.visibility import visibility_of

from .numpy_entropy import visible


def written_out(kind, allowed):
    """A mask that hides what is not allowed [1 or 2, 1 or 4, n_query, n_key]; one of all sequences is expanded."""
    allowed = torch.from_numpy(allowed)
    if kind != "bool":
        hidden = -torch.inf if kind == "-inf" else torch.finfo(torch.bfloat16).min
        allowed = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, hidden)
    return allowed.expand(2, -1, -1, -1)


@settings(max_examples=300, deadline=None)
@given(
    n_query=st.integers(1, 20),
    n_cached=st.integers(0, 5),
    shape=st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 4)]),
    kind=st.sampled_from(["bool", "-inf", "min"]),
    window=st.sampled_from([None, 3]),
    flipped=st.one_of(st.none(), st.integers(0, 10**6)),
    small_blocks=st.booleans(),
)
def test_a_mask_that_is_causality_is_taken_for_it_and_no_other(
    n_query, n_cached, shape, kind, window, flipped, small_blocks
):
    n_key = n_query + n_cached
    allowed = np.tile(visible(n_query, n_key, True, None), (*shape, 1, 1))
    if flipped is not None:
        allowed.flat[flipped % allowed.size] ^= True
    q, k = torch.zeros(2, 4, n_query, 8), torch.zeros(2, 2, n_key, 8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(visibility_module, "BLOCK_ELEMENTS", 1 if small_blocks else 2**22)
        seen = visibility_of(q, k, is_causal=False, attention_mask=written_out(kind, allowed), sliding_window=window)
    assert (seen.allowed is None) == seen.is_causal == (flipped is None)
    expected = np.broadcast_to(allowed & visible(n_query, n_key, False, window), (2, 4, n_query, n_key)).sum(-1)
    np.testing.assert_array_equal(np.broadcast_to(seen.counts, (2, 4, n_query)), expected)


def test_more_queries_than_keys_are_never_causal():
    allowed = torch.ones(5, 3, dtype=torch.bool).tril(-2)[None, None]
    q, k = torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 3, 8)
    seen = visibility_of(q, k, is_causal=False, attention_mask=allowed, sliding_window=None)
    assert not seen.is_causal
    assert seen.counts.flatten().tolist() == [0, 0, 1, 2, 3]
