import math
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch

from normfree.entropy import attention_entropy, entropy_bands, uniform_entropy_bound
from normfree.errors import InputError


def published_heads():
    path = files("normfree.report") / "published" / "relu_revival_figure1_headwise_entropy.csv"
    with path.open() as file:
        return pd.read_csv(file)


def test_bands_of_the_published_heatmaps_are_those_of_the_paper():
    heads = published_heads()
    maximum = heads.entropy_nats.max()
    top = {name: entropy_bands(group.entropy_nats, maximum)[3] for name, group in heads.groupby("config")}
    assert round(100 * top["SM+G"], 1) == 57.6
    assert round(100 * top["SM+R"], 1) == 22.2


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_bands_are_closed_below_and_the_last_above_too(kind):
    values = kind([0.0, 0.99, 1.0, 2.0, 2.5, 3.0, 4.0, 4.0])
    assert entropy_bands(values).tolist() == [2 / 8, 1 / 8, 2 / 8, 3 / 8]
    assert entropy_bands(values, maximum=8.0).tolist() == [3 / 8, 3 / 8, 2 / 8, 0]


def test_nan_heads_are_in_no_band_and_are_not_left_out():
    bands = entropy_bands(torch.tensor([[1.0, math.nan], [4.0, math.nan]]))
    assert bands.tolist() == [0, 0.25, 0, 0.25]
    assert entropy_bands([math.nan, math.nan]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("entropy", "maximum", "message"),
    [
        ([], None, "at least one head"),
        ([-0.1, 1.0], None, "cannot be negative"),
        ([0.0, 0.0], None, "positive number of nats"),
        ([1.0], math.nan, "positive number of nats"),
        ([1.0, 2.0], 1.5, "above maximum=1.5"),
    ],
)
def test_bands_refuse_what_has_no_bands(entropy, maximum, message):
    with pytest.raises(InputError, match=message):
        entropy_bands(entropy, maximum)


def test_uniform_bound_of_the_paper():
    assert uniform_entropy_bound(128) == pytest.approx(math.lgamma(129) / 128)
    assert round(uniform_entropy_bound(128), 3) == 3.878
    assert uniform_entropy_bound(5, 9, is_causal=False) == pytest.approx(math.log(9))
    assert uniform_entropy_bound(2, 9) == pytest.approx((math.log(8) + math.log(9)) / 2)
    assert uniform_entropy_bound(4, sliding_window=2) == pytest.approx(3 * math.log(2) / 4)
    assert uniform_entropy_bound(1, 1) == 0


@pytest.mark.parametrize(("n_query", "n_key", "is_causal"), [(7, 7, True), (3, 9, True), (5, 8, False)])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_uniform_bound_is_reached_by_uniform_attention(n_query, n_key, is_causal, window):
    q, k = torch.zeros(1, 1, n_query, 4), torch.randn(1, 1, n_key, 4)
    entropy = attention_entropy(q, k, is_causal=is_causal, sliding_window=window)
    bound = uniform_entropy_bound(n_query, n_key, is_causal, window)
    assert entropy.mean().item() == pytest.approx(bound, abs=1e-6)


def test_uniform_bound_refuses_nothing_to_see():
    with pytest.raises(InputError, match="at least 1"):
        uniform_entropy_bound(0)
    with pytest.raises(InputError, match="at least as many keys"):
        uniform_entropy_bound(4, 3)
