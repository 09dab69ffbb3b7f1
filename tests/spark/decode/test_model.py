"""Generation of whole models by the sparse decode against the masked dense computation of the same models."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.spark.cache import SparkCacheLayer, spark_layer
from normfree.spark.decoding import MAX_ROWS, sparse_decode

from .available import BACKENDS, DEVICES

VOCABULARY = 61


def spark_model(*, seed=0, **options):
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_positions": 200,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 48,
    }
    defaults: dict[str, Any] = {"ffn": "spark", "attention": "spark", "ffn_active": 0.1, "attention_active": 12}
    torch.manual_seed(seed)
    config = NormfreeConfig(**(sizes | defaults | {"initializer_range": 0.1, "tie_word_embeddings": False} | options))
    return NormfreeForCausalLM(config).eval()


def prompts():
    """Two prompts of 30 tokens, the second with 7 of padding on the left."""
    tokens = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model, n_token=24, **options):
    """Token ids, and the logits of the new ones [n_token, batch, vocabulary]."""
    inputs = {name: each.to(model.device) for name, each in prompts().items()}
    returned = {"output_logits": True, "return_dict_in_generate": True}
    options = {"do_sample": False, "pad_token_id": 0} | returned | options
    out = model.generate(**inputs, max_new_tokens=n_token, **options)
    return out.sequences.cpu(), torch.stack(out.logits).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"position": "rotary", "mlp_bias": False, "attention_bias": "none"},
        {"position": "learned"},
        {"attention": "softmax", "attention_active": None, "norm": "rmsnorm"},
        {"ffn": "dense", "ffn_active": None, "parallel_residual": True},
    ],
    ids=["rotary", "learned with biases", "sparse network only", "sparse attention only"],
)
def test_greedy_generation_is_that_of_the_masked_dense_computation(backend, options):
    model = spark_model(**options).to(DEVICES[backend])
    n_token = 3 if backend == "triton" and DEVICES[backend] == "cpu" else 24
    tokens, logits = generated(model, n_token)
    with sparse_decode(model, backend=backend):
        sparse_tokens, sparse_logits = generated(model, n_token)
    assert torch.equal(sparse_tokens, tokens)
    torch.testing.assert_close(sparse_logits, logits, rtol=0, atol=1e-4)


def test_beam_search_reorders_the_cache():
    model = spark_model()
    tokens, _ = generated(model, 10, num_beams=3)
    with sparse_decode(model):
        sparse_tokens, _ = generated(model, 10, num_beams=3)
    assert torch.equal(sparse_tokens, tokens)


def test_bfloat16_follows_float32():
    model = spark_model()
    _, logits = generated(model, 1)
    model.bfloat16()
    with sparse_decode(model):
        _, sparse_logits = generated(model, 1)
    torch.testing.assert_close(sparse_logits, logits, rtol=0, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dense_weights_are_not_kept_twice_and_come_back_as_they_were(backend):
    model = spark_model().to(DEVICES[backend])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with sparse_decode(model, backend=backend):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, before[name])
        ffn = model.model.blocks[0].ffn
        by_row, by_column = (
            ([ffn.predictor_proj], [ffn.down_proj]) if backend == "cpu" else ([], [ffn.predictor_proj, ffn.down_proj])
        )
        assert all(projection.weight.is_contiguous() for projection in by_row)
        for projection in by_column:
            assert projection.weight.t().is_contiguous()
            assert projection.weight.untyped_storage().nbytes() == projection.weight.numel() * 4
    for name, weight in model.state_dict().items():
        assert weight.is_contiguous()
        assert torch.equal(weight, before[name])
    assert not any("forward" in vars(module) for module in model.modules())


def test_dense_layers_of_a_step_are_not_called():
    """Of a step of one token, no network of the model computes all its neurons; a longer prompt does."""
    model, called = spark_model(), []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == model.config.n_inner:
            module.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad(), sparse_decode(model):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
        assert not called
        model(input_ids=torch.zeros(1, MAX_ROWS + 1, dtype=torch.long), use_cache=True)
        assert called


def test_gradients_take_the_ordinary_path():
    model = spark_model()
    tokens = prompts()["input_ids"][:, :3]
    with sparse_decode(model):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.model.blocks[0].ffn.predictor_proj.weight.grad.abs().sum() > 0


def test_a_cache_begun_outside_goes_on_inside_and_outside_again():
    model = spark_model()
    tokens = prompts()["input_ids"][:1]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(input_ids=tokens[:, :10], cache=cache).logits]
        with sparse_decode(model):
            parts += [model(input_ids=tokens[:, i : i + 1], cache=cache).logits for i in range(10, 14)]
            parts.append(model(input_ids=tokens[:, 14:18], cache=cache).logits)
        assert all(isinstance(layer, SparkCacheLayer) for layer in cache.layers)
        parts.append(model(input_ids=tokens[:, 18:], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-4)


def test_a_cache_layer_holds_what_it_is_given_while_it_grows():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 700, 10), torch.randn(2, 3, 700, 10)
    layer = SparkCacheLayer(4)
    for start, stop in ((0, 300), (300, 301), (301, 700)):
        found = layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        for mine, right in zip(found, (keys, values), strict=True):
            assert torch.equal(mine, right[:, :, :stop])
    assert layer.get_seq_length() == 700
    assert layer.get_mask_sizes(5) == (705, 0)
    layer.crop(-200)
    assert torch.equal(layer.predictor_keys, keys[:, :, :500, :4])
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.rest_keys, keys[1:, :, :500, 4:])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.stored_values, values[[1, 1], :, :500])
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(keys, values)[0], keys)


def test_a_cache_of_a_fixed_size_is_refused():
    cache = StaticCache(config=spark_model().config, max_cache_len=20)
    with pytest.raises(InputError, match="cannot use a cache of StaticLayer; leave cache_implementation out"):
        spark_layer(cache, 0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": "dense", "attention": "softmax", "ffn_active": None, "attention_active": None}, "nothing to decode"),
        ({"topk": "exact"}, "chooses by topk 'statistical', and this model by 'exact'"),
    ],
)
def test_a_model_that_cannot_be_decoded_sparsely_is_refused(options, message):
    with pytest.raises(InputError, match=message), sparse_decode(spark_model(**options)):
        pass


def test_weights_that_are_no_plain_linear_and_unknown_backends_are_refused():
    model = spark_model()
    with pytest.raises(InputError, match="unknown sparse decode backend 'cuda'"), sparse_decode(model, backend="cuda"):
        pass
    model.model.blocks[1].ffn.up_proj = nn.utils.parametrizations.weight_norm(model.model.blocks[1].ffn.up_proj)
    with pytest.raises(InputError, match=r"plain nn\.Linear weights"), sparse_decode(model):
        pass
    assert model.model.blocks[0].ffn.down_proj.weight.is_contiguous()


def test_two_at_a_time_are_refused():
    model = spark_model()
    with sparse_decode(model), pytest.raises(InputError, match="already decodes sparsely"), sparse_decode(model):
        pass
