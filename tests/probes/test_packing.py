"""Sequences packed into one row give what each gives alone, for every statistic that knows positions."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward

from normfree.probes import EntropyProbe, interception
from normfree.probes.interception import InterfaceCall

from .small_models import build
from .test_own_attention import build as build_own

LENGTHS = (9, 5, 12)
RESULTS = ("per_head", "per_position", "maximum", "sink_share", "rows")


def tokens_of(seed=0):
    return torch.randint(1, 50, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))


def positions():
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def block_diagonal(*, is_causal=True):
    mask = torch.block_diag(*[torch.ones(n, n) for n in LENGTHS]).bool()
    return (mask.tril() if is_causal else mask)[None, None]


def alone(model, tokens):
    with EntropyProbe(model) as probe, torch.no_grad():
        for each in tokens.split(LENGTHS, dim=1):
            model(input_ids=each)
    return probe


def assert_same(found, expected, atol=2e-5):
    assert found.unreadable == expected.unreadable == {}
    for result in RESULTS:
        np.testing.assert_allclose(
            getattr(found, result)().numpy(), getattr(expected, result)().numpy(), rtol=0, atol=atol, err_msg=result
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_position_ids_that_begin_again(name, implementation):
    model, tokens = build(name), tokens_of()
    model.set_attn_implementation(implementation)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, position_ids=positions(), use_cache=False)
    assert_same(probe, alone(model, tokens))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_block_diagonal_mask(implementation):
    model, tokens = build("llama"), tokens_of()
    model.set_attn_implementation(implementation)
    mask = block_diagonal()
    if implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, attention_mask=mask, position_ids=positions(), use_cache=False)
    assert_same(probe, alone(model, tokens))


def test_rows_packed_differently_with_padding_at_the_end():
    model = build("llama")
    tokens = torch.cat([tokens_of(0), tokens_of(1)])
    second = torch.block_diag(torch.ones(7, 7), torch.ones(14, 14), torch.zeros(5, 5)).bool().tril()
    mask = torch.stack([block_diagonal()[0], second[None]])
    ids = torch.cat([positions(), torch.cat([torch.arange(7), torch.arange(14), torch.zeros(5).long()])[None]])
    model.set_attn_implementation("eager")
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, attention_mask=mask, position_ids=ids, use_cache=False)
    expected = alone(model, tokens[:1])
    with expected, torch.no_grad():
        for each in tokens[1:, :21].split((7, 14), dim=1):
            model(input_ids=each)
    assert_same(probe, expected)


def test_attention_that_crosses_positions_that_begin_again_is_one_sequence():
    """With a mask of its own transformers does not look at position ids, and the model attends across."""
    model, tokens = build("llama"), tokens_of()
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions())
    assert probe.per_position().shape[-1] == tokens.shape[1]
    expected = np.log(np.arange(1, tokens.shape[1] + 1)).mean()
    np.testing.assert_allclose(probe.maximum().numpy(), expected, rtol=1e-6)


def test_flash_attention_reads_packing_without_a_mask(monkeypatch):
    """The kernel is not needed: what it is called with is that of sdpa, without its mask."""
    model, tokens = build("mistral"), tokens_of()

    def as_flash(function, is_eager, args, kwargs, result):
        call = describe(function, is_eager, args, kwargs, result)
        others = call.others | {"position_ids": positions(), "sliding_window": 6}
        return InterfaceCall(flash_attention_forward, False, call.module, call.query, call.key, None, None, 0, others)

    describe = interception._describe
    monkeypatch.setattr(interception, "_describe", as_flash)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, position_ids=positions(), use_cache=False)
    monkeypatch.undo()
    assert_same(probe, alone(model, tokens))


def test_a_block_mask_of_flex_attention(monkeypatch):
    model, tokens = build("llama"), tokens_of()
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))

    def same_sequence(batch, head, query, key):
        return (query >= key) & (sequence[query] == sequence[key])

    n = tokens.shape[1]
    block_mask = create_block_mask(same_sequence, None, None, n, n, device="cpu")
    describe = interception._describe

    def as_flex(function, is_eager, args, kwargs, result):
        call = describe(function, is_eager, args, kwargs, result)
        return InterfaceCall(
            flex_attention_forward, False, call.module, call.query, call.key, block_mask, None, 0, call.others
        )

    monkeypatch.setattr(interception, "_describe", as_flex)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, position_ids=positions(), use_cache=False)
    monkeypatch.undo()
    assert_same(probe, alone(model, tokens))


class OwnAttention(nn.Module):
    def __init__(self, *, is_causal=True):
        super().__init__()
        self.n_head = 4
        self.is_causal = is_causal
        self.qk = nn.Linear(32, 64)

    def forward(self, x, mask):
        q, k = self.qk(x).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
        return torch.softmax((q @ k.mT).masked_fill(~mask, -torch.inf), -1)


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_own_softmaxes_and_bidirectional_attention(is_causal):
    torch.manual_seed(0)
    model, x = OwnAttention(is_causal=is_causal), torch.randn(1, sum(LENGTHS), 32)
    with EntropyProbe(model) as probe:
        model(x, block_diagonal(is_causal=is_causal))
    with EntropyProbe(model) as expected:
        for each in x.split(LENGTHS, dim=1):
            mask = torch.ones(1, 1, each.shape[1], each.shape[1]).bool()
            model(each, mask.tril() if is_causal else mask)
    assert_same(probe, expected)


def test_a_model_outside_the_interface():
    """Its local layers have a window, so a query may see less than its sequence."""
    model, tokens = build_own("gpt_neo"), tokens_of()
    mask = torch.zeros(block_diagonal().shape).masked_fill(~block_diagonal(), torch.finfo(torch.float32).min)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, attention_mask=mask, position_ids=positions(), use_cache=False)
    assert_same(probe, alone(model, tokens))


@pytest.mark.parametrize("padding", [0, 4])
def test_chunks_of_attention_are_no_sequences(padding):
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    torch.manual_seed(0)
    config = Llama4TextConfig(vocab_size=50, attention_chunk_size=8, **sizes, **heads, pad_token_id=0)
    model, tokens = Llama4ForCausalLM(config).eval(), tokens_of()
    mask = torch.ones_like(tokens)
    mask[:, :padding] = 0
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, attention_mask=mask)
    n = tokens.shape[1] - padding
    assert probe.per_position().shape[-1] == tokens.shape[1]
    chunked = np.log(np.arange(n) % 8 + 1).mean()
    assert config.layer_types is not None
    layers = ["full" if "full" in kind else "chunked" for kind in config.layer_types]
    for row, kind in enumerate(layers):
        expected = chunked if kind == "chunked" else np.log(np.arange(1, n + 1)).mean()
        np.testing.assert_allclose(probe.maximum()[row].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tree", "backward"])
@torch.no_grad()
def test_sequences_that_are_not_apart_are_refused(kind):
    model, x = OwnAttention(), torch.randn(1, 8, 32)
    mask = torch.ones(8, 8).bool().tril()
    if kind == "tree":
        mask[4, :4] = False  # begins, yet those after it see what was before it
    else:
        mask = mask.T
    with EntropyProbe(model) as probe:
        model(x, mask[None, None])
    assert list(probe.unreadable) == [""]
    assert "not apart" in probe.unreadable[""] or "cannot be told" in probe.unreadable[""]
