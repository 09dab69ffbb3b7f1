"""Running sums over queries, by the compiled kernel and by torch, against float64 NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfree.entropy import compiled_kernels
from normfree.probes.layer_statistics import LayerStatistics, Queries

N_HEAD = 3


def batch(generator, start, n_query, n_sequence, *, bad, padding, per_head):
    """One call's queries, entropies and shares."""
    entropy, share = torch.rand(2, n_sequence, N_HEAD, n_query, generator=generator)
    if bad == "entropy":
        entropy[-1, 1, -1] = math.nan
    if bad == "share":
        share[0, 2, 0] = math.nan
    valid = torch.ones(n_sequence, n_query, dtype=torch.bool)
    if padding:
        valid = torch.rand(n_sequence, n_query, generator=generator) < 0.7
    shape = (n_sequence, N_HEAD, n_query) if per_head else (1, 1, n_query)
    return Queries(start, valid, torch.randint(1, 50, shape, generator=generator)), entropy, share


def assert_sums_are_right(found, batches):
    T = max(queries.start + entropy.shape[2] for queries, entropy, _ in batches)
    sums = {name: np.zeros((N_HEAD, T)) for name in ("entropy", "bound", "nan_rows", "rows")}
    sink, sink_queries, sink_rows = np.zeros(N_HEAD), np.zeros(N_HEAD), 0
    for queries, entropies, shares in batches:
        counts = queries.counts.expand(entropies.shape)
        for place in np.argwhere(queries.valid.numpy()):
            b, i = place.tolist()
            for head in range(N_HEAD):
                to, entropy = (head, queries.start + i), entropies[b, head, i].double().item()
                sums["rows"][to] += 1
                sums["bound"][to] += math.log(counts[b, head, i].item())
                sums["nan_rows"][to] += math.isnan(entropy)
                sums["entropy"][to] += 0 if math.isnan(entropy) else entropy
                if queries.start == 0:
                    share = shares[b, head, i].double().item()
                    sink[head] += 0 if math.isnan(share) else share
                    sink_queries[head] += share > 0.3
            sink_rows += queries.start == 0
    np.testing.assert_array_equal(found.rows.expand(N_HEAD, T).numpy(), sums.pop("rows"))
    for name, expected in sums.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(found.sink.numpy(), sink, rtol=1e-12)
    np.testing.assert_array_equal(found.sink_queries.numpy(), sink_queries)
    assert found.sink_rows.item() == sink_rows


@pytest.fixture(params=["kernel", "torch"])
def by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(compiled_kernels, "kernels_refuse", lambda: "not wanted")
    elif compiled_kernels.kernels_refuse() is not None:
        pytest.skip("no compiled kernels")
    return request.param


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([0, 0, 4, 11]),
            st.integers(1, 9),
            st.integers(1, 3),
            st.sampled_from([None, None, "entropy", "share"]),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**31),
)
def test_batches_add_up(by, calls, seed):
    generator = torch.Generator().manual_seed(seed)
    layer, batches = LayerStatistics.zeros(N_HEAD, 1, torch.device("cpu")), []
    for start, n_query, n_sequence, bad, padding, per_head in calls:
        made = batch(generator, start, n_query, n_sequence, bad=bad, padding=padding, per_head=per_head)
        queries, entropy, share = made
        layer.add(queries, entropy, share if start == 0 else None)
        batches.append(made)
    assert_sums_are_right(layer, batches)


def test_views_and_other_dtypes_are_taken(by):
    generator = torch.Generator().manual_seed(0)
    queries, entropy, share = batch(generator, 0, 6, 4, bad=None, padding=False, per_head=True)
    layer = LayerStatistics.zeros(N_HEAD, 6, torch.device("cpu"))
    layer.add(queries, entropy.double(), share.double())
    layer.add(queries, entropy.transpose(1, 2).contiguous().transpose(1, 2), share.expand_as(share))
    assert_sums_are_right(layer, 2 * [(queries, entropy, share)])
