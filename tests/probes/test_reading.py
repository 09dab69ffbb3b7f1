"""How calls of each attention implementation are read, where this machine cannot run the implementation itself."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from normfree.probes.interception import InterfaceCall
from normfree.probes.reading import REFUSED_ARGUMENTS, UnreadableCallError, read_call


def call_of(function, *, batch=2, n_query=6, n_key=6, mask=None, module=None, n_positional=0, **others):
    torch.manual_seed(0)
    query, key = torch.randn(batch, 4, n_query, 8), torch.randn(batch, 2, n_key, 8)
    return InterfaceCall(
        function=function,
        is_eager=False,
        module=nn.Module() if module is None else module,
        query=query,
        key=key,
        attention_mask=mask,
        weights=None,
        n_positional=n_positional,
        others=others,
    )


def test_sdpa_is_causal_only_without_a_mask_and_for_more_than_one_query():
    assert read_call(call_of(sdpa_attention_forward)).is_causal
    assert not read_call(call_of(sdpa_attention_forward, n_query=1)).is_causal
    assert not read_call(call_of(sdpa_attention_forward, mask=torch.ones(2, 1, 6, 6).bool())).is_causal
    assert not read_call(call_of(sdpa_attention_forward, is_causal=False)).is_causal
    bidirectional: Any = nn.Module()
    bidirectional.is_causal = False
    assert not read_call(call_of(sdpa_attention_forward, module=bidirectional)).is_causal
    assert read_call(call_of(sdpa_attention_forward, module=bidirectional, is_causal=True)).is_causal


def test_sdpa_leaves_out_the_empty_end_of_a_static_cache():
    attention = read_call(call_of(sdpa_attention_forward, n_key=9))
    assert attention.is_causal
    assert attention.k.shape[2] == 6
    assert read_call(call_of(sdpa_attention_forward, n_query=1, n_key=9)).k.shape[2] == 9


def test_flash_takes_causality_window_and_padding_from_the_arguments():
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    attention = read_call(call_of(flash_attention_forward, n_key=9, mask=mask, sliding_window=4, scaling=0.5))
    assert attention.is_causal
    assert attention.sliding_window == 4
    assert attention.scale == 0.5
    torch.testing.assert_close(attention.attention_mask, mask.bool(), rtol=0, atol=0)
    short = read_call(call_of(flash_attention_forward, n_key=9, mask=mask[:, :7]))
    assert short.k.shape[2] == 7
    assert not read_call(call_of(flash_attention_forward, is_causal=False)).is_causal


LENGTHS = torch.tensor([0, 2, 6], dtype=torch.int32)
PACKINGS: dict[str, Any] = {
    "position ids": {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])},
    "lengths": {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "max_length_q": 4, "max_length_k": 4},
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_flash_packs_sequences_by_position_ids_or_lengths(packing):
    assert read_call(call_of(flash_attention_forward, position_ids=torch.arange(6)[None])).sequences == ()
    attention = read_call(call_of(flash_attention_forward, batch=1, **PACKINGS[packing]))
    assert attention.sequences == ((0, 0, 2), (0, 2, 6))


def test_flash_packs_nothing_where_transformers_does_not():
    """Position ids of several rows, of a padded batch, or lengths without their largest."""
    restarting = torch.tensor([[0, 1, 0, 1, 2, 3]] * 2)
    assert read_call(call_of(flash_attention_forward, position_ids=restarting)).sequences == ()
    padding = torch.ones(1, 6, dtype=torch.int64)
    padded = call_of(flash_attention_forward, batch=1, mask=padding, position_ids=restarting[:1])
    assert read_call(padded).sequences == ()
    some: dict[str, Any] = {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS}
    assert read_call(call_of(flash_attention_forward, batch=1, **some)).sequences == ()


@pytest.mark.parametrize("wrong", [{"batch": 2}, {"n_key": 8}])
def test_flash_packings_that_do_not_fit_the_call_are_refused(wrong):
    with pytest.raises(UnreadableCallError, match="packed"):
        read_call(call_of(flash_attention_forward, **{"batch": 1, **PACKINGS["lengths"], **wrong}))


def test_flex_block_masks_are_written_out():
    def windowed(batch, head, query, key):
        return (query >= key) & (query - key < 3)

    block_mask = create_block_mask(windowed, B=2, H=None, Q_LEN=6, KV_LEN=6, device="cpu")
    attention = read_call(call_of(flex_attention_forward, mask=block_mask))
    assert not attention.is_causal
    expected = torch.ones(6, 6).tril().triu(-2).bool()
    assert attention.attention_mask is not None
    torch.testing.assert_close(attention.attention_mask.expand(2, 1, 6, 6), expected.expand(2, 1, 6, 6), rtol=0, atol=0)
    assert read_call(call_of(flex_attention_forward)).attention_mask is None


@pytest.mark.parametrize("argument", REFUSED_ARGUMENTS)
def test_arguments_that_change_the_weights_are_refused(argument):
    with pytest.raises(UnreadableCallError, match=REFUSED_ARGUMENTS[argument]):
        read_call(call_of(sdpa_attention_forward, **{argument: torch.ones(1)}))
    assert read_call(call_of(sdpa_attention_forward, **{argument: None})).is_causal


def with_sinks(*shape):
    module = nn.Module()
    module.sinks = nn.Parameter(torch.randn(shape))
    return module


def test_flash_and_flex_take_a_soft_cap_and_a_learned_sink():
    module = with_sinks(4)
    for function in (flash_attention_forward, flex_attention_forward):
        attention = read_call(call_of(function, module=module, softcap=30, s_aux=module.sinks))
        assert attention.softcap == 30.0
        torch.testing.assert_close(attention.sinks, module.sinks, rtol=0, atol=0)
        assert attention.weights is None
    # flash attention rounds the sink to the queries' precision
    call = call_of(flash_attention_forward, module=module, s_aux=module.sinks)
    half = dataclasses.replace(call, query=call.query.half(), key=call.key.half())
    torch.testing.assert_close(read_call(half).sinks, module.sinks.half(), rtol=0, atol=0)


def test_sdpa_and_flex_take_a_position_bias():
    bias = torch.randn(1, 4, 6, 9)
    attention = read_call(call_of(sdpa_attention_forward, n_key=9, position_bias=bias))
    torch.testing.assert_close(attention.bias, bias[..., :6], rtol=0, atol=0)  # the empty end of a static cache
    attention = read_call(call_of(flex_attention_forward, n_key=9, position_bias=bias))
    torch.testing.assert_close(attention.bias, bias, rtol=0, atol=0)


def eager_ignoring(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An eager function that knows nothing but the mask."""


def eager_with_all(module, query, key, value, attention_mask, softcap=None, position_bias=None, **kwargs):
    return module.sinks


def test_eager_functions_are_asked_what_they_take():
    module, bias = with_sinks(4, 1, 1), torch.randn(1, 1, 6, 6)

    def eager(function, **others):
        return dataclasses.replace(call_of(function, module=module, **others), is_eager=True)

    attention = read_call(eager(eager_with_all, softcap=2.0, position_bias=bias, s_aux=module.sinks))
    assert attention.softcap == 2.0
    torch.testing.assert_close(attention.bias, bias, rtol=0, atol=0)
    torch.testing.assert_close(attention.sinks, module.sinks.flatten(), rtol=0, atol=0)
    torch.testing.assert_close(read_call(eager(eager_with_all)).sinks, module.sinks.flatten(), rtol=0, atol=0)
    with pytest.raises(UnreadableCallError, match="not the one of its module"):
        read_call(eager(eager_with_all, s_aux=torch.zeros(4)))
    with pytest.raises(
        UnreadableCallError, match="has a learned attention sink that its attention function does not take"
    ):
        read_call(eager(eager_ignoring))
    module.sinks = None
    with pytest.raises(UnreadableCallError, match="has a soft-cap that its attention function does not take"):
        read_call(eager(eager_ignoring, softcap=2.0))
    assert read_call(eager(eager_with_all)).sinks is None


@pytest.mark.parametrize(
    ("function", "others", "reason"),
    [
        (sdpa_attention_forward, {"s_aux": torch.zeros(4)}, "has a learned attention sink that its"),
        (sdpa_attention_forward, {"sinks": torch.zeros(2, 4, 6, 1)}, "has a learned attention sink that its"),
        (sdpa_attention_forward, {"softcap": 50.0}, "has a soft-cap that its"),
        (sdpa_attention_forward, {"module": with_sinks(4)}, "has a learned attention sink that its"),
        (flash_attention_forward, {"position_bias": torch.zeros(1, 1, 6, 6)}, "has a position bias that its"),
        (flash_attention_forward, {"softcap": 0.0}, "soft-capped by 0.0"),
        (flex_attention_forward, {"s_aux": torch.zeros(3)}, r"sinks have shape \[3\]"),
        (flex_attention_forward, {"position_bias": torch.zeros(1, 3, 6, 6)}, r"shape \[1, 3, 6, 6\]"),
        (flex_attention_forward, {"position_bias": torch.zeros(6, 6)}, r"shape \[6, 6\]"),
        (flex_attention_forward, {"position_bias": torch.zeros(1, 1, 6, 6).bool()}, "position bias has torch.bool"),
    ],
)
def test_what_a_function_ignores_or_nobody_knows_is_refused(function, others, reason):
    with pytest.raises(UnreadableCallError, match=reason):
        read_call(call_of(function, **others))


def test_other_calls_that_are_not_understood_are_refused():
    compressing = nn.Module()
    compressing.compressor = nn.Linear(1, 1)
    with pytest.raises(UnreadableCallError, match="compressed keys"):
        read_call(call_of(sdpa_attention_forward, module=compressing))
    with pytest.raises(UnreadableCallError, match="by place"):
        read_call(call_of(sdpa_attention_forward, n_positional=1))
    with pytest.raises(UnreadableCallError, match="not a tensor"):
        read_call(call_of(sdpa_attention_forward, mask=torch.ones(2, 6)))
    with pytest.raises(UnreadableCallError, match="not a padding mask"):
        read_call(call_of(flash_attention_forward, mask=torch.ones(2, 1, 6, 6)))
