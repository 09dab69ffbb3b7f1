"""Patching against modules that are swapped by hand, gradients against finite differences."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from normfree.errors import InputError
from normfree.interpret import PromptPairs, agreement, logit_difference, patch_heads, patch_residual_stream
from tests.interpret.small_decoders import ALL, LINEAR_READOUT, NORMED, T, decoder, gpt2, parallel_norm_free, tokens

N = 3
PAIRS = PromptPairs(tokens(N, T), tokens(N, T, seed=1), tokens(N, seed=2), tokens(N, seed=3))


def metric(model, input_ids):
    with torch.no_grad():
        last = model(input_ids=input_ids, use_cache=False).logits[:, -1].double()
    return torch.stack([last[i, PAIRS.answers[i]] - last[i, PAIRS.wrong_answers[i]] for i in range(N)])


class Swapped(nn.Module):
    """Stands in for a module: remembers what it reads, or reads ``change`` of it instead."""

    def __init__(self, module, change=lambda x: x):
        super().__init__()
        self.module, self.change = module, change

    def forward(self, x, **kwargs):
        self.read = x
        return self.module(self.change(x), **kwargs)


def run_swapped(model, place, input_ids, change=lambda x: x):
    """The metric and what was read at ``place``: a layer's heads, or ("stream", layer), the stream after the layer."""
    if not isinstance(place, tuple):
        holder, name = model.model.blocks[place].attention, "o_proj"
    elif place[1] + 1 == model.config.n_layer:
        holder, name = model.model, "final_norm"
    else:
        holder, name = model.model.blocks, str(place[1] + 1)
    stand_in = Swapped(getattr(holder, name), change)
    setattr(holder, name, stand_in)
    value = metric(model, input_ids)
    setattr(holder, name, stand_in.module)
    return value, stand_in.read


def mixed(clean, corrupted, where, share=1.0):
    """``corrupted`` moved towards ``clean`` by ``share`` at the index ``where``."""

    def change(x):
        moved = x.clone()
        moved[where] = corrupted[where] + share * (clean[where] - corrupted[where])
        return moved

    return change


def place_and_index(model, row, by_position):
    if "head" not in row:
        return ("stream", int(row["layer"])), (slice(None), int(row["position"]))
    width = model.config.head_dim
    own = slice(int(row["head"]) * width, (int(row["head"]) + 1) * width)
    position = int(row["position"]) if by_position else slice(None)
    return int(row["layer"]), (slice(None), position, own)


@pytest.mark.parametrize("kind", ["heads", "heads_by_position", "stream"])
@pytest.mark.parametrize("name", ALL)
def test_both_patchings_against_swapped_modules_in_float64(name, kind):
    model = ALL[name]().double()
    by_position = kind != "heads"
    if kind == "stream":
        frame = patch_residual_stream(model, PAIRS, batch_size=2)
    else:
        frame = patch_heads(model, PAIRS, by_position=by_position, batch_size=2)
    n_layer, n_head = model.config.n_layer, model.config.n_head
    assert len(frame) == N * n_layer * (1 if kind == "stream" else n_head) * (T if by_position else 1)
    base = metric(model, PAIRS.corrupted)
    patches = frame[frame["pair"] == 0].sample(10 if len(frame) > 100 else 4, random_state=0)
    for _, row in patches.iterrows():
        place, where = place_and_index(model, row, by_position)
        (_, clean), (_, corrupted) = (run_swapped(model, place, ids) for ids in (PAIRS.clean, PAIRS.corrupted))
        patched, _ = run_swapped(model, place, PAIRS.corrupted, mixed(clean, corrupted, where))
        step = 1e-4
        up, down = (
            run_swapped(model, place, PAIRS.corrupted, mixed(clean, corrupted, where, share))[0]
            for share in (step, -step)
        )
        keys = [key for key in ("layer", "head", "position") if key in frame]
        same = frame[(frame[keys] == row[keys]).all(axis=1)].sort_values("pair")
        assert same["pair"].tolist() == list(range(N))
        np.testing.assert_allclose(same["activation_patching"], patched - base, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(same["attribution_patching"], (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LINEAR_READOUT)
def test_the_last_residual_stream_is_patched_exactly_where_the_readout_is_linear(name):
    frame = patch_residual_stream(LINEAR_READOUT[name](), PAIRS)
    last = frame[(frame["layer"] == frame["layer"].max()) & (frame["position"] == T - 1)]
    assert last["activation_patching"].abs().min() > 0.01
    np.testing.assert_allclose(last["activation_patching"], last["attribution_patching"], atol=1e-5)
    earlier = frame[frame["layer"] < frame["layer"].max()]
    assert agreement(earlier).nmae > 0.05


def test_heads_that_nothing_but_the_unembedding_reads_are_patched_exactly():
    """The last layer of a norm-free model whose feed-forward network reads beside its heads, not after them."""
    frame = patch_heads(parallel_norm_free(), PAIRS)
    last = frame[frame["layer"] == frame["layer"].max()]
    assert last["activation_patching"].abs().mean() > 0.01
    np.testing.assert_allclose(last["activation_patching"], last["attribution_patching"], atol=1e-5)
    assert agreement(frame[frame["layer"] == 0]).nmae > 0.01


def test_the_whole_effect_of_the_last_stream_is_the_difference_of_the_two_runs():
    model = gpt2().double()
    frame = patch_residual_stream(model, PAIRS)
    last = frame[(frame["layer"] == 1) & (frame["position"] == T - 1)]
    clean, corrupted = logit_difference(model, PAIRS), logit_difference(model, PAIRS, corrupted=True)
    np.testing.assert_allclose(clean, metric(model, PAIRS.clean))
    np.testing.assert_allclose(corrupted, metric(model, PAIRS.corrupted))
    np.testing.assert_allclose(last["activation_patching"], clean - corrupted)
    before = frame[(frame["layer"] == 1) & (frame["position"] < T - 1)]
    assert (before[["activation_patching", "attribution_patching"]] == 0).all(axis=None)


@pytest.mark.parametrize("name", NORMED)
def test_positions_of_a_head_add_up_in_attribution(name):
    model = NORMED[name]()
    whole, by_position = patch_heads(model, PAIRS), patch_heads(model, PAIRS, by_position=True)
    assert list(whole.columns) == ["pair", "layer", "head", "activation_patching", "attribution_patching"]
    assert list(by_position.columns) == [*whole.columns[:3], "position", *whole.columns[3:]]
    summed = by_position.groupby(["pair", "layer", "head"])["attribution_patching"].sum()
    np.testing.assert_allclose(whole["attribution_patching"], summed, atol=1e-5)


def test_weights_keep_their_gradients_and_may_be_frozen():
    model = gpt2()
    expected = patch_heads(model, PAIRS)
    assert all(parameter.grad is None for parameter in model.parameters())
    # differences of float32 logits of about 1: what another order of sums may change of them
    close: dict[str, Any] = {"rtol": 0.0, "atol": 1e-6}
    pd.testing.assert_frame_equal(patch_heads(model.requires_grad_(False), PAIRS), expected, **close)
    with torch.no_grad():
        pd.testing.assert_frame_equal(patch_heads(model, PAIRS), expected, **close)


def test_agreement_is_pearsons_and_the_normalized_error():
    draw = np.random.default_rng(0)
    activation = draw.normal(size=40)
    attribution = 0.7 * activation + 0.2 * draw.normal(size=40) + 0.1
    frame = pd.DataFrame({"activation_patching": activation, "attribution_patching": attribution})
    found = agreement(frame)
    assert found.pearson == pytest.approx(stats.pearsonr(activation, attribution).statistic)
    assert found.nmae == pytest.approx(np.mean(np.abs(attribution - activation)) / np.mean(np.abs(activation)))
    assert found.n == 40
    frame.loc[3, "attribution_patching"] = np.nan
    assert np.isnan(agreement(frame).pearson)
    assert np.isnan(agreement(frame).nmae)
    assert np.isnan(agreement(frame.assign(attribution_patching=1.0)).pearson)
    with pytest.raises(InputError, match="at least 2 patches, got 1"):
        agreement(frame.iloc[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": tokens(N, T + 1)}, r"corrupted prompts must be int64 token ids of shape \[3, 7\]"),
        ({"answers": tokens(N + 1)}, r"answers must be int64 token ids of shape \[3\]"),
        ({"wrong_answers": tokens(N).int()}, "wrong answers must be int64"),
        ({"clean": tokens(0, T)}, "not empty"),
        ({"answers": tokens(N) + 50}, "answers hold token ids"),
    ],
)
def test_bad_pairs(change, message):
    pairs = PromptPairs(**{**vars(PAIRS), **change})
    for patch in (patch_heads, patch_residual_stream, logit_difference):
        with pytest.raises(InputError, match=message):
            patch(gpt2(), pairs)


def test_post_norm_is_refused():
    with pytest.raises(InputError, match="norm_placement is 'post'"):
        patch_heads(decoder(norm="layernorm", norm_placement="post"), PAIRS)
