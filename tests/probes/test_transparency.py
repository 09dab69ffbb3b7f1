"""A probe never breaks or changes what it observes: what it cannot read it names."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    JambaConfig,
    StaticCache,
)
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from normfree.probes import EntropyProbe, measuring
from normfree.probes.layer_statistics import LayerStatistics

from .small_models import batch_of, build

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = SIZES | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
SHARED = {
    "gemma3n": Gemma3nTextConfig(
        **GROUPED, vocab_size_per_layer_input=50, hidden_size_per_layer_input=8, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5, activation_sparsity_pattern=[0.0] * 4
    ),
    "gemma4": Gemma4TextConfig(  # type: ignore[call-arg]
        **GROUPED, vocab_size_per_layer_input=50, hidden_size_per_layer_input=8, global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5
    ),
    "jamba": JambaConfig(
        **SIZES, num_key_value_heads=2, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4
    ),
}  # fmt: skip


def outputs_of(model, **batch):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", SHARED)
def test_layers_without_a_cache_of_their_own(name, use_cache):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHARED[name]).eval()
    batch = batch_of("none")
    bare = outputs_of(model, **batch, use_cache=use_cache)
    with EntropyProbe(model) as probe:
        assert torch.equal(outputs_of(model, **batch, use_cache=use_cache), bare)
    assert probe.unreadable == {}
    assert probe.per_position().shape[-1] == 16


@pytest.mark.parametrize("name", SHARED)
def test_positions_of_shared_keys_are_those_of_the_tokens(name):
    torch.manual_seed(0)
    model, batch = AutoModelForCausalLM.from_config(SHARED[name]).eval(), batch_of("none", n_token=7)
    model.generation_config.eos_token_id = None
    with EntropyProbe(model) as probe, torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    with EntropyProbe(model) as whole, torch.no_grad():
        model(input_ids=tokens[:, :-1], use_cache=False)
    assert probe.unreadable == {}
    found, expected = probe.per_position(), whole.per_position()
    rows = probe.rows()[:, 0].tolist()
    # From transformers 5.24 on, of a prompt, layers without keys of their own attend from the last token alone.
    if name == "gemma4" and rows != [28, 28, 28, 28]:
        assert rows == [28, 28, 16, 16]
        assert found[2:, :, :6].isnan().all()
        expected[2:, :, :6] = torch.nan
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, equal_nan=True)


def test_decoder_of_an_encoder_with_a_cache():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    inner: dict[str, Any] = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32, "vocab_size": 50}
    model = BartForConditionalGeneration(BartConfig(**sizes, **inner)).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids = batch_of("none", n_token=9)["input_ids"]
    with EntropyProbe(model) as probe, torch.no_grad():
        tokens = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    with EntropyProbe(model) as whole, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=tokens[:, :-1], use_cache=False)
    assert probe.unreadable == {}
    torch.testing.assert_close(probe.per_position(), whole.per_position(), rtol=0, atol=1e-4, equal_nan=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": lambda model: torch.save(model.state_dict(), io.BytesIO()),
    "save": lambda model: torch.save(model, io.BytesIO()),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_model_can_be_copied_while_it_is_observed(name):
    model, batch = build("llama"), batch_of("none")
    bare = outputs_of(model, **batch)
    with EntropyProbe(model) as probe:
        copied = COPIES[name](model)
        if copied is not None:
            assert torch.equal(outputs_of(copied, **batch), bare)
        assert set(probe.unreadable) == set(probe.layers)  # a copy is another model
        outputs_of(model, **batch)
    assert probe.unreadable == {}
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_a_model_can_be_saved_while_it_is_observed(tmp_path):
    model, batch = build("llama"), batch_of("none")
    with EntropyProbe(model):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded.eval(), **batch), outputs_of(model, **batch))


def test_the_meta_device_is_named():
    model = build("llama").to("meta")
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.int64, device="meta"))
    assert len(probe.unreadable) == 2
    assert all("meta device" in reason for reason in probe.unreadable.values())


def odd_attention(change):
    """An attention function, called as someone else's code may call it, whose result is the eager one's."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, enable_gqa=True)
        return change(output.transpose(1, 2).contiguous())

    return attention


@pytest.mark.parametrize(
    "change", [lambda output: (output, None), lambda output: (output,), lambda output: [output, "weights"]]
)
def test_results_of_any_form_reach_the_model(change):
    model, batch = build("llama"), batch_of("none")
    AttentionInterface.register("odd", odd_attention(change))
    try:
        model.set_attn_implementation("odd")
        with EntropyProbe(model) as probe:
            try:
                probed = outputs_of(model, **batch)
            except ValueError as error:
                probed = str(error)
        try:
            bare = outputs_of(model, **batch)
        except ValueError as error:
            bare = str(error)
        assert probed == bare if isinstance(bare, str) else torch.equal(probed, bare)
        assert all("are not known" in reason for reason in list(probe.unreadable.values())[:1])
    finally:
        del AttentionInterface._global_mapping["odd"]


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()])
def test_errors_of_an_attention_function_are_the_models_own(error):
    def failing(*args, **kwargs):
        raise error

    model, batch = build("llama"), batch_of("none")
    AttentionInterface.register("failing", failing)
    try:
        model.set_attn_implementation("failing")
        with EntropyProbe(model) as probe:
            with pytest.raises(type(error)):
                outputs_of(model, **batch)
            model.set_attn_implementation("sdpa")
            outputs_of(model, **batch)
    finally:
        del AttentionInterface._global_mapping["failing"]
    assert probe.unreadable == {}
    assert (probe.rows() == batch["input_ids"].numel()).all()


BREAKAGES = {
    "out of memory": (measuring, "attention_entropy_and_sink", torch.OutOfMemoryError("CUDA out of memory.\nTried")),
    "a bug": (LayerStatistics, "add", ZeroDivisionError("division by zero")),
    "cache": (Cache, "get_seq_length", NotImplementedError("no length")),
    "warning as error": (measuring, "read_call", UserWarning("deprecated")),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_whatever_breaks_in_a_probe_stays_there(monkeypatch, name):
    model, batch = build("gpt2"), batch_of("none")
    cache = DynamicCache(config=model.config)
    position_ids = torch.arange(16)[None]
    bare = outputs_of(model, **batch, position_ids=position_ids, past_key_values=DynamicCache(config=model.config))
    owner, function, error = BREAKAGES[name]
    original = getattr(owner, function)

    def breaking(*args, **kwargs):
        raise error

    with EntropyProbe(model) as probe:
        hooked = model.transformer.h[0].register_forward_pre_hook(
            lambda *_: monkeypatch.setattr(owner, function, breaking)
        )
        restored = model.transformer.ln_f.register_forward_pre_hook(lambda *_: monkeypatch.undo())
        if name == "cache":  # the model asks for the length before its layers
            probed = outputs_of(model, **batch, position_ids=position_ids, past_key_values=cache)
        else:
            probed = outputs_of(model, **batch, position_ids=position_ids, past_key_values=cache)
    hooked.remove()
    restored.remove()
    assert getattr(owner, function) is original
    assert torch.equal(probed, bare)
    assert len(probe.unreadable) == 2
    assert all(type(error).__name__ in reason and "\n" not in reason for reason in probe.unreadable.values())


def test_a_keyboard_interrupt_passes_through_the_probe(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model = build("llama")
    monkeypatch.setattr(measuring, "read_call", interrupted)
    with EntropyProbe(model) as probe:
        with pytest.raises(KeyboardInterrupt):
            outputs_of(model, **batch_of("none"))
        monkeypatch.undo()
        outputs_of(model, **batch_of("none"))
    assert probe.unreadable == {}
    assert (probe.rows() == 32).all()


def test_statistics_of_inference_mode_are_used_outside_of_it():
    model, batch = build("llama"), batch_of("none")
    with EntropyProbe(model) as probe:
        with torch.inference_mode():
            model(**batch)
        model(**batch).logits.sum().backward()
        with torch.inference_mode():
            model(**batch_of("none", n_token=20))
    assert probe.unreadable == {}
    assert (probe.rows() == 2 * (16 + 16 + 20)).all()


@pytest.mark.parametrize("shape", [(2, 16, 8), (1, 2, 4, 16, 8), (2, 4, 16, 0)])
def test_queries_of_odd_shapes_are_named(shape):
    class Odd(nn.Module):
        def forward(self, x):
            attend = AttentionInterface().get_interface("eager", lambda *_, **__: (x, None))
            return attend(self, torch.zeros(shape), torch.zeros(shape), torch.zeros(shape), None, scaling=1.0)[0]

    model, x = nn.Sequential(Odd()), torch.ones(2, 3)
    with EntropyProbe(model) as probe:
        assert torch.equal(model(x), x)
    assert list(probe.unreadable) == ["0"]


def test_static_and_quantized_lengths_are_known_without_the_module():
    """A cache is passed by a name of the module's own."""
    model, batch = build("llama"), batch_of("none", n_token=10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with EntropyProbe(model) as probe, torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 10)):
            model(input_ids=batch["input_ids"][:, start:stop], past_key_values=cache)
    with EntropyProbe(model) as whole, torch.no_grad():
        model(input_ids=batch["input_ids"])
    torch.testing.assert_close(probe.per_position(), whole.per_position(), rtol=0, atol=2e-5)
