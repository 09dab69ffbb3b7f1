"""Sink shares against the weights of eager attention, stds against NumPy on the model's own hidden states."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from normfree.errors import InputError
from normfree.interpret import attention_sinks, residual_std_by_position
from tests.interpret.small_decoders import ALL, T, decoder, gpt2, tokens

SEQUENCES = tokens(5, T)


@pytest.mark.parametrize("name", ALL)
def test_shares_are_what_the_heads_pay_to_the_first_token(name):
    model = ALL[name]()
    frame = attention_sinks(model, SEQUENCES, batch_size=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(SEQUENCES, output_attentions=True, use_cache=False).attentions
    shares = torch.stack([weights[..., 0].mean((0, 2)) for weights in attentions]).numpy()
    np.testing.assert_allclose(frame["sink_share"].to_numpy().reshape(shares.shape), shares, rtol=1e-5)
    above = torch.stack([(weights[..., 0] > 0.3).double().mean((0, 2)) for weights in attentions]).numpy()
    np.testing.assert_allclose(frame["sink_query_share"].to_numpy().reshape(above.shape), above, rtol=1e-6)
    assert above.min() >= 1 / T, "the first query sees nothing else"
    assert list(frame.columns) == ["layer", "head", "sink_share", "sink_query_share", "is_sink"]
    assert (frame["is_sink"] == (shares.ravel() > 0.3)).all()


@pytest.mark.parametrize("name", ALL)
def test_stds_over_channels_by_position(name):
    model = ALL[name]()
    frame = residual_std_by_position(model, SEQUENCES, batch_size=2)
    with torch.no_grad():
        states = model(SEQUENCES, output_hidden_states=True, use_cache=False).hidden_states
    n_layer = model.config.n_layer
    found = frame.pivot(index="layer", columns="position", values="residual_std").to_numpy()
    assert found.shape == (n_layer, T)
    # the last of transformers' hidden states is after the final norm
    for layer in range(n_layer - 1):
        expected = states[layer + 1].double().numpy().std(axis=-1).mean(axis=0)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-6)
    if model.config.final_norm == "none":
        np.testing.assert_allclose(found[-1], states[-1].double().numpy().std(axis=-1).mean(axis=0), rtol=1e-6)


def test_stock_models_are_read_as_they_are():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    frame = residual_std_by_position(model, SEQUENCES)
    with torch.no_grad():
        first = model(SEQUENCES, output_hidden_states=True).hidden_states[1]
    np.testing.assert_allclose(
        frame[frame["layer"] == 0]["residual_std"], first.double().numpy().std(axis=-1).mean(axis=0), rtol=1e-6
    )
    assert len(attention_sinks(model, SEQUENCES)) == 4


def test_nan_stays_nan():
    model = decoder()
    with torch.no_grad():
        model.model.blocks[1].ffn.down_proj.bias[0] = torch.nan
    stds = residual_std_by_position(model, SEQUENCES)
    assert stds["residual_std"].isna().tolist() == [False] * T + [True] * (2 * T)
    sinks = attention_sinks(model, SEQUENCES)
    assert sinks[sinks["layer"] == 2][["sink_share", "sink_query_share"]].isna().all(axis=None)
    assert not sinks[sinks["layer"] == 2]["is_sink"].any()


@pytest.mark.parametrize("measure", [attention_sinks, residual_std_by_position])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (8,)])
def test_sequences_without_tokens_are_refused(measure, shape):
    with pytest.raises(InputError, match="n and T at least 1"):
        measure(gpt2(), torch.zeros(shape, dtype=torch.long))
