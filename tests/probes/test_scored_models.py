"""Models with soft-caps, position biases and learned sinks, against the weights that their eager attention hands back.

Eager attention drops the sink's column from its weights: what a row lacks of 1 is the sink's. Granite's sliding-window
models scale the attention's output instead.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, T5Config, T5Model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from normfree.errors import InputError
from normfree.probes import EntropyProbe, EntropyRecorder
from normfree.probes.interception import InterfaceCall
from normfree.probes.reading import read_call
from normfree.probes.watching import Attending, AttentionWatch, Row

from .small_models import batch_of

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
} | dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4)
INKLING: dict[str, Any] = {
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "sliding_window_size": 6,
}
SOFT_CAPPED = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}

ARCHITECTURES: dict[str, Any] = {
    "gemma2": SOFT_CAPPED,
    "vaultgemma": SOFT_CAPPED,
    "inkling_text": INKLING | {"d_rel": 4, "rel_extent": 8, "n_shared_experts": 1},
    "gpt_oss": {},
    "flint": {},
    "mimo_v2_flash": {},  # sinks in sliding-window layers only
    "hy_v4": {"initializer_range": 0.1},
    "hy_v4_vl_text": {"initializer_range": 0.1},
    "openai_privacy_filter": {},  # attends to both sides
    "granite_swa": {},
    "granitemoe_swa": {},
}
SCALES_OUTPUT = ("granite_swa", "granitemoe_swa")
TOLERANCE = 5e-6  # nats: float32 weights give the sink's share, 1 - Σ p, to about 1e-7


def build(name, **overrides):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SIZES | ARCHITECTURES.get(name, {}) | overrides)
    is_causal = name not in ("hy_v4_vl_text", "openai_privacy_filter")
    factory = AutoModelForCausalLM if is_causal else AutoModel
    model = factory.from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            nn.init.normal_(parameter.data)
    return model


def attended_of(model, batch, attentions):
    """What the sinks leave to the keys, [batch, n_head, T] a layer: what attention's output is scaled by."""
    outputs, values, handles = [], [], []
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            handles.append(module.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])))
        elif name.endswith("v_proj"):
            handles.append(module.register_forward_hook(lambda _, inputs, output: values.append(output)))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    shares = []
    for output, value, weights in zip(outputs, values, attentions, strict=True):
        heads = [each.unflatten(-1, (-1, 8)).transpose(1, 2).double() for each in (output, value)]
        whole = weights.double() @ heads[1].repeat_interleave(2, dim=1)
        shares.append((heads[0] * whole).sum(-1) / whole.square().sum(-1))
    return [each.numpy() for each in shares]


def weights_and_sinks_of(name, model, batch):
    """Weights next to the sink, float64 [batch, n_head, T, T] a layer, and the sink's own share [batch, n_head, T]."""
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    weights = [each.double().numpy() for each in attentions]
    if name in SCALES_OUTPUT:
        attended = attended_of(model, batch, attentions)
        weights = [each * share[..., None] for each, share in zip(weights, attended, strict=True)]
    return [(each, np.maximum(1 - each.sum(-1), 0)) for each in weights]


def has_sinks(model, layer_name):
    return getattr(model.get_submodule(layer_name), "sinks", None) is not None


def plogp(p):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0.0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_against_their_own_eager_attention(name, padding, backend):
    model, batch = build(name), batch_of(padding)
    with EntropyProbe(model, backend=backend) as probe, torch.no_grad():
        model(**batch)
    assert probe.unreadable == {}
    real = batch["attention_mask"].bool().numpy()
    first, weight, rows = real.argmax(-1), real[:, None], real.sum()
    assert (probe.rows() == int(rows)).all()
    for layer, (p, sink) in enumerate(weights_and_sinks_of(name, model, batch)):
        joins = has_sinks(model, probe.layers[layer])
        entropy = -plogp(p).sum(-1) - (plogp(sink) if joins else 0)
        bound = np.log(np.maximum((p > 0).sum(-1) + joins, 1))
        share = np.take_along_axis(p, first[:, None, None, None], -1)[..., 0]
        expected = {"per_head": entropy, "maximum": bound, "sink_share": share}
        for result, each in expected.items():
            mean = np.where(weight, each, 0).sum((0, 2)) / rows
            found = getattr(probe, result)()[layer].numpy()
            np.testing.assert_allclose(found, mean, rtol=0, atol=TOLERANCE, err_msg=f"{result} of layer {layer}")


@pytest.mark.parametrize("name", ["gemma2", "inkling_text", "gpt_oss", "granite_swa"])
def test_queries_that_a_cache_continues_are_those_of_one_call(name):
    model, ids = build(name, use_cache=True), batch_of("none")["input_ids"]
    with EntropyProbe(model) as whole, torch.no_grad():
        model(input_ids=ids)
    with EntropyProbe(model) as parts, torch.no_grad():
        cache = model(input_ids=ids[:, :9], use_cache=True).past_key_values
        for start in range(9, 16):
            model(input_ids=ids[:, start : start + 1], past_key_values=cache)
    assert parts.unreadable == {}
    for result in ("per_position", "maximum"):
        torch.testing.assert_close(getattr(parts, result)(), getattr(whole, result)(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_sdpa_takes_a_position_bias(padding):
    model, batch = build("inkling_text"), batch_of(padding)
    with EntropyProbe(model) as eager, torch.no_grad():
        model(**batch)
    model.set_attn_implementation("sdpa")
    with EntropyProbe(model) as sdpa, torch.no_grad():
        model(**batch)
    assert sdpa.unreadable == {}
    for result in ("per_head", "maximum", "sink_share"):
        torch.testing.assert_close(getattr(sdpa, result)(), getattr(eager, result)(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_encoder_decoder_with_relative_position_biases(implementation):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = T5Model(T5Config(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter.data, std=2.0)
    ids = torch.randint(1, 50, (2, 16))
    inputs: dict[str, Any] = {"input_ids": ids, "decoder_input_ids": ids[:, :9]}
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    with EntropyProbe(model, backend="reference") as probe, torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        result = twin(**inputs, output_attentions=True)
    kinds = {"encoder": result.encoder_attentions, "SelfAttention": result.decoder_attentions}
    assert probe.unreadable == {}
    taken = {"encoder": 0, "SelfAttention": 0, "EncDecAttention": 0}
    kinds["EncDecAttention"] = result.cross_attentions
    for row, name in enumerate(probe.layers):
        kind = next(each for each in kinds if each in name)
        p = kinds[kind][taken[kind]].double().numpy()
        np.testing.assert_allclose(probe.per_head()[row].numpy(), -plogp(p).sum(-1).mean((0, 2)), atol=TOLERANCE)
        taken[kind] += 1
    assert taken == dict.fromkeys(kinds, 2)


def test_sinks_of_every_query_s_own():
    model = build("inkling2_text", **INKLING, rel_extent=8)
    calls: list[InterfaceCall] = []

    def keep(row: Row, attending: Attending) -> None:
        assert isinstance(attending.call, InterfaceCall)
        calls.append(attending.call)

    with AttentionWatch(model, keep).watch(), torch.no_grad():
        attentions = model(input_ids=batch_of("none")["input_ids"], output_attentions=True).attentions
    over_tokens = [call for call in calls if call.others.get("sinks") is not None]
    for call, weights in zip(over_tokens, attentions, strict=True):
        attention = read_call(call)
        assert attention.sinks is not None
        assert attention.sinks.shape == (2, 4, 16)
        with torch.no_grad():
            entropy = attention.entropy()
        p = weights.double().numpy()
        expected = -plogp(p).sum(-1) - plogp(np.maximum(1 - p.sum(-1), 0))
        np.testing.assert_allclose(entropy.numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma2", "inkling_text", "gpt_oss", "flint"])
def test_a_loss_on_the_entropy_reaches_all_that_makes_it(name):
    """The gradient in every weight, biases and sinks included, is that of autograd through the model's own weights."""
    model, ids = build(name, initializer_range=0.15), batch_of("none")["input_ids"]
    with EntropyRecorder(model) as recorded:
        attentions = model(input_ids=ids, output_attentions=True).attentions
    entropy, weighting = recorded.per_head(), torch.randn(2, 3, 4)

    def terms(p):
        return -p * p.clamp_min(1e-30).log()

    by_layer = []
    for weights in attentions:
        sink = 1 - weights.sum(-1) if name in ("gpt_oss", "flint") else torch.zeros(())
        by_layer.append((terms(weights).sum(-1) + terms(sink)).mean(-1))
    expected = torch.stack(by_layer, dim=1)
    torch.testing.assert_close(entropy.double(), expected.double(), rtol=0, atol=TOLERANCE)
    named = dict(model.named_parameters())
    found = torch.autograd.grad((entropy * weighting).sum(), [*named.values()], retain_graph=True, allow_unused=True)
    right = torch.autograd.grad((expected * weighting).sum(), [*named.values()], allow_unused=True)
    reached = [parameter for parameter, gradient in zip(named, found, strict=True) if gradient is not None]
    assert sum(parameter.endswith("sinks") for parameter in reached) == (3 if name in ("gpt_oss", "flint") else 0)
    assert any("rel_logits_proj" in parameter for parameter in reached) == (name == "inkling_text")
    whole = torch.stack([each.norm() for each in right if each is not None]).norm()
    for mine, other in zip(found, right, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or (mine - other).norm() <= 1e-4 * whole


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_nan_is_counted_and_overflows_too(name):
    """A soft-cap hides an infinite score from the weights, not from the count."""
    model, batch = build(name), batch_of("none")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:8] *= 1e30
        model.model.layers[0].self_attn.k_proj.weight[:8] *= 1e30
        model.model.layers[1].self_attn.q_proj.weight[8:16] = torch.nan
    with EntropyProbe(model, count_nonfinite=True) as probe, torch.no_grad():
        model(**batch)
    nan, inf = probe.nonfinite()
    assert inf[0, 0] > 0
    assert (inf[0, 2:] == 0).all()
    if name == "gemma2":
        assert (probe.nan_rows()[0] == 0).all()
        assert (nan[1] > 0).tolist() == [False, True, False, False]
    else:
        assert probe.nan_rows()[0, 0] > 0
        assert probe.per_head()[0, 0].isnan()


def test_compressed_keys_are_named():
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"]
    model = build("deepseek_v4", num_hidden_layers=4, layer_types=kinds)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch_of("none"))
    compressed = {name for name in probe.layers if getattr(model.get_submodule(name), "compressor", None) is not None}
    assert set(probe.unreadable) == compressed
    assert len(compressed) == 2
    assert all("compressed keys" in reason for reason in probe.unreadable.values())


def test_a_backend_that_cannot_is_named_in_unreadable():
    model = build("gemma2")
    with EntropyProbe(model, backend="cpu") as probe, torch.no_grad():
        model(**batch_of("none"))
    assert len(probe.unreadable) == 3
    assert all("without a soft-cap" in reason for reason in probe.unreadable.values())
    with pytest.raises(InputError, match="without a soft-cap"):
        probe.per_head()
