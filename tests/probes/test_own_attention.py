"""Models that compute their softmax themselves, against the attention weights that they return."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from normfree.probes import EntropyProbe

from .small_models import batch_of
from .test_entropy_probe import entropies_of

SCALED_DOT_PRODUCT_ATTENTION = nn.functional.scaled_dot_product_attention
N_HEAD = 4
SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": N_HEAD, "hidden_size": 32}
DECODER = {"is_decoder": True, "intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": N_HEAD, "n_layers": 2},
    "falcon": {"alibi": True},
    "falcon rotary": {"multi_query": False},
    "gpt_neo": {"num_layers": 2, "num_heads": N_HEAD, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 1},
    "openai-gpt": {"n_positions": 64},
    "xglm": {"d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": N_HEAD},
    "roformer": DECODER,
    "rembert": DECODER | {"input_embedding_size": 16, "output_embedding_size": 16},
    "megatron-bert": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": N_HEAD},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": N_HEAD, "d_inner": 32},
}


def build(name, implementation="eager"):
    torch.manual_seed(0)
    sizes = SIZES | MODELS[name]
    config = CONFIG_MAPPING[name.split()[0]](**sizes)
    config._attn_implementation = implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def expected_of(model, batch):
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    entropy, p = entropies_of(attentions)
    real = batch["attention_mask"].numpy().astype(bool)
    weight, rows = real[None, :, None, :], real.sum()
    first = real.argmax(-1)[None, :, None, None, None]
    sink = np.take_along_axis(p, first, -1)[..., 0]
    return {
        "per_head": (entropy * weight).sum((1, 3)) / rows,
        "per_position": (entropy * weight).sum(1) / real.sum(0),
        "maximum": np.where(weight, np.log(np.maximum((p > 0).sum(-1), 1)), 0.0).sum((1, 3)) / rows,
        "sink_share": (sink * weight).sum((1, 3)) / rows,
    }


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_own_softmaxes_against_the_weights_that_the_model_returns(name, padding):
    model, batch = build(name), batch_of(padding)
    with torch.no_grad():
        bare = model(**batch).logits
        with EntropyProbe(model, count_nonfinite=True) as probe:
            assert torch.equal(model(**batch).logits, bare)
    assert probe.unreadable == {}
    assert len(probe.layers) == 2
    assert (probe.rows() == int(batch["attention_mask"].sum())).all()
    assert all((count == 0).all() for count in probe.nonfinite())
    for result, expected in expected_of(model, batch).items():
        np.testing.assert_allclose(getattr(probe, result)().numpy(), expected, rtol=0, atol=2e-5, err_msg=result)


class MaterialisedWeights(TorchFunctionMode):
    """The weights of every ``scaled_dot_product_attention``, float64, from its arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is SCALED_DOT_PRODUCT_ATTENTION:
            query, key, mask = args[0].double(), args[1].double(), kwargs["attn_mask"]
            scores = query @ key.mT / query.shape[-1] ** 0.5
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            self.found.append(scores.softmax(-1))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["falcon", "falcon rotary"])
def test_own_calls_of_scaled_dot_product_attention(name):
    """Falcon's two ways do not agree with one another under ALiBi, so the reference is what this way computes."""
    batch, model = batch_of("left"), build(name, "sdpa")
    with EntropyProbe(model) as probe, torch.no_grad(), MaterialisedWeights() as weights:
        model(**batch)
    assert probe.unreadable == {}
    entropy, p = entropies_of(weights.found)
    real = batch["attention_mask"].numpy()[None, :, None]
    expected = np.where(real, entropy, 0.0).sum((1, 3)) / real.sum()
    np.testing.assert_allclose(probe.per_head().numpy(), expected, rtol=0, atol=2e-5)
    bound = np.where(real, np.log((p > 0).sum(-1).clip(1)), 0.0).sum((1, 3)) / real.sum()
    np.testing.assert_allclose(probe.maximum().numpy(), bound, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "falcon", "mpt"])
def test_generation_gives_what_one_pass_gives(name):
    model, batch = build(name), batch_of("none", n_token=7)
    model.generation_config.eos_token_id = None
    with EntropyProbe(model) as probe, torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    whole = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones(2, 14, dtype=torch.int64)}
    expected = expected_of(model, whole)
    for result in ("per_head", "per_position", "maximum"):
        np.testing.assert_allclose(getattr(probe, result)().numpy(), expected[result], rtol=0, atol=3e-5)
    assert probe.taken_back == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_read_before_the_softmax_rounds_them(dtype):
    model, batch = build("gpt_neox_japanese").to(dtype), batch_of("left")
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch)
    exact = expected_of(model.float(), batch)
    assert (probe.rows() == int(batch["attention_mask"].sum())).all()
    np.testing.assert_allclose(probe.maximum().numpy(), exact["maximum"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(probe.per_head().numpy(), exact["per_head"], rtol=0, atol=0.05)


class Attending(nn.Module):
    """An attention of someone's own, and a router with a softmax of the same kind."""

    def __init__(self, *, named: bool):
        super().__init__()
        self.qkv, self.router = nn.Linear(32, 96), nn.Linear(32, 4)
        if named:
            self.n_head = N_HEAD

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, N_HEAD, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 8**0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        self.weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        gate = torch.softmax(self.router(x), -1)
        return x + (self.weights @ v).transpose(1, 2).flatten(2) * gate.sum(-1, keepdim=True)


@torch.no_grad()
def test_attention_of_ones_own_is_found_without_a_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), Attending(named=True), Attending(named=True))
    with EntropyProbe(model) as probe:
        model(batch_of("none")["input_ids"])
    assert probe.layers == ("1", "2")
    entropy, _ = entropies_of([model[1].weights, model[2].weights])
    np.testing.assert_allclose(probe.per_head().numpy(), entropy.mean((1, 3)), rtol=0, atol=1e-6)
    assert len(probe.unreadable) == 0


@torch.no_grad()
def test_a_softmax_of_an_attention_whose_heads_are_not_known_is_named():
    class OneHeadedAttention(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    model = nn.Sequential(nn.Embedding(50, 32), OneHeadedAttention())
    with EntropyProbe(model) as probe:
        model(batch_of("none")["input_ids"])
    assert probe.unreadable == {"1": "it computes a softmax over scores of shape [2, 16, 16]"}
