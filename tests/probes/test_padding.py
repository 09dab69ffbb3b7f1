"""Queries that are padding, by the mask alone."""

import pytest
import torch

from normfree.entropy.visibility import Visibility, visible_range
from normfree.probes.padding import UnclearPaddingError, valid_queries

T = 6


def visibility_of_mask(mask):
    first, last = visible_range(*mask.shape[2:], is_causal=False, sliding_window=None)
    n_query, n_key = mask.shape[2:]
    return Visibility(n_query, n_key, False, None, first, last, mask, None, mask.device, (mask.shape[0], 4))


def causal():
    return torch.ones(T, T).bool().tril()


REAL = torch.tensor([False, False, True, True, True, True])
MASKS = {
    "causal": (causal(), [True] * T),
    "left padding": (causal() & REAL, REAL.tolist()),
    "right padding": (causal() & REAL.flip(0), REAL.flip(0).tolist()),
    "window and right padding": (causal().triu(-2) & REAL.flip(0), REAL.flip(0).tolist()),
    "bidirectional padding": (REAL.expand(T, T), REAL.tolist()),
    "padding that sees itself": (REAL | torch.eye(T).bool(), REAL.tolist()),
    "prefix": (causal() | (torch.arange(T) < 3), [True] * T),
    "packed": (torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().tril(), [True] * T),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_without_choices(name):
    mask, expected = MASKS[name]
    assert valid_queries(visibility_of_mask(mask[None, None]), 0, is_causal=True).tolist() == [expected]


def test_a_sparse_mask_that_hides_own_keys_which_others_see():
    mask = causal()
    mask[3, [1, 3]] = False  # key 3 is seen by query 4
    assert valid_queries(visibility_of_mask(mask[None, None]), 0, is_causal=True).all()


@pytest.mark.parametrize("queries", [[5], [3, 4, 5]])
def test_a_sparse_mask_that_hides_a_key_from_all_is_unclear(queries):
    mask = causal()
    mask[queries, 1] = False
    mask[:, 5] = False
    with pytest.raises(UnclearPaddingError):
        valid_queries(visibility_of_mask(mask[None, None]), 0, is_causal=True)


def test_heads_that_choose_differently():
    mask = causal().expand(1, 2, T, T).clone()
    mask[0, 0, 4, [1, 4]] = False
    assert valid_queries(visibility_of_mask(mask), 0, is_causal=True).all()
    mask[0, 1, 4, [0, 4]] = False
    assert valid_queries(visibility_of_mask(mask), 0, is_causal=True).all()


def test_a_query_that_a_cache_continues():
    mask = torch.ones(2, 1, 1, T).bool()
    mask[0] = False
    mask[1, ..., :2] = False
    assert valid_queries(visibility_of_mask(mask), T - 1, is_causal=True).tolist() == [[False], [True]]
    mask[1, ..., -1] = False
    with pytest.raises(UnclearPaddingError):
        valid_queries(visibility_of_mask(mask), T - 1, is_causal=True)
