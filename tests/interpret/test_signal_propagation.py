"""The table of a model's layers, against NumPy on its own hidden states."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from normfree.errors import InputError
from normfree.interpret import measure_signal_propagation

TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=40, n_positions=8, initializer_range=0.5, **TOKENS)
    return GPT2LMHeadModel(config).eval()


def test_a_row_a_layer_over_all_batches(model):
    sequences = torch.randint(0, 40, (7, 8))
    frame = measure_signal_propagation(model, sequences, batch_size=3)
    assert frame["layer"].tolist() == [0, 1, 2]
    assert frame["module"].tolist() == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert frame["tokens"].tolist() == [56] * 3
    assert frame["residual_nan_count"].tolist() == frame["residual_inf_count"].tolist() == [0] * 3
    with torch.no_grad():
        states = model(sequences, output_hidden_states=True).hidden_states[1:-1]
    for layer, state in enumerate(states):
        x = state.double().numpy()
        row = frame.iloc[layer]
        power = (x**2).mean((0, 1))
        assert row["residual_rms"] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
        assert row["residual_kurtosis"] == pytest.approx((power**2).mean() / power.mean() ** 2, rel=1e-6)
        assert row["residual_excess_kurtosis"] == pytest.approx(stats.kurtosis(x.ravel()), rel=1e-5)


def test_nan_stands_in_the_table(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[2] = torch.nan
    frame = measure_signal_propagation(model, torch.randint(0, 40, (2, 8)))
    assert frame["residual_rms"].isna().tolist() == [False, True, True]
    assert frame["residual_nan_count"].tolist()[:2] == [0, 16]


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_sequences_without_two_tokens_are_refused(model, shape):
    with pytest.raises(InputError, match="at least 2"):
        measure_signal_propagation(model, torch.zeros(shape, dtype=torch.long))


def test_a_block_that_cannot_be_read_is_named(model):
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: {"hidden_states": output})
    model.transformer.h[2].register_forward_pre_hook(lambda module, inputs: (inputs[0]["hidden_states"], *inputs[1:]))
    with pytest.raises(InputError, match=r"cannot be read after transformer.h.1: it puts out dict"):
        measure_signal_propagation(model, torch.randint(0, 40, (2, 8)))
