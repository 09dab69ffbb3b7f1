"""One call of a module is not one forward pass: what is counted where."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DynamicCache,
    HrmTextConfig,
)

from normfree.errors import InputError
from normfree.probes import EntropyProbe, EntropyRecorder

from .small_models import batch_of, build
from .test_entropy_probe import entropies_of, expected_of

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}


def randomized(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def albert():
    config = AlbertConfig(**SIZES, embedding_size=16, num_hidden_layers=3)
    return randomized(AlbertModel(config))


def test_a_module_called_several_times_has_a_row_for_each_call():
    model, batch = albert(), batch_of("right")
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch)
        model(**batch)
    assert probe.layers == (name, f"{name} (call 2)", f"{name} (call 3)")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        entropy, _ = entropies_of(model(**batch, output_attentions=True).attentions)
    real = batch["attention_mask"].numpy()[None, :, None]
    np.testing.assert_allclose(probe.per_head().numpy(), (entropy * real).sum((1, 3)) / real.sum(), atol=2e-5)
    assert (probe.rows() == 2 * real.sum()).all()


def test_a_model_that_loops_over_its_layers():
    sizes: dict[str, Any] = {
        "num_layers_per_stack": 2,
        "H_cycles": 2,
        "L_cycles": 2,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    model = randomized(AutoModelForCausalLM.from_config(HrmTextConfig(**SIZES, **sizes)))
    model.generation_config.eos_token_id = None
    batch = batch_of("none", n_token=9)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch, use_cache=False)
    calls = [name.partition(" (call ") for name in probe.layers]
    assert len(calls) == 2 * (2 * 2 + 2)  # two layers, four low and two high cycles
    assert sum(name.startswith("model.L_module") and not call for name, call, _ in calls) == 2
    model.set_attn_implementation("eager")
    with EntropyProbe(model, backend="reference") as eager, torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with EntropyProbe(model) as whole, torch.no_grad():
        model(input_ids=tokens[:, :-1], use_cache=False)
    assert whole.layers == probe.layers == eager.layers
    torch.testing.assert_close(eager.per_position(), whole.per_position(), rtol=0, atol=2e-5)


class Looped(nn.Module):
    """Calls what it contains, a model or only its layers, several times."""

    def __init__(self, inner, n=3):
        super().__init__()
        self.inner, self.n = inner, n

    def forward(self, **batch):
        return [self.inner(**batch) for _ in range(self.n)][-1]


def test_calls_of_a_whole_model_by_a_wrapper_are_forward_passes():
    model, batch = build("llama"), batch_of("none")
    with EntropyProbe(Looped(model)) as probe, torch.no_grad():
        probe._watch._modules[0](**batch)
    assert probe.layers == ("inner.model.layers.0.self_attn", "inner.model.layers.1.self_attn")
    assert (probe.rows() == 3 * 32).all()
    np.testing.assert_allclose(probe.per_head().numpy(), expected_of(model, batch)["per_head"], rtol=0, atol=2e-5)


def test_layers_called_one_by_one_are_passes_of_their_own():
    model = build("llama")
    hidden, positions = torch.randn(2, 6, 32), torch.arange(6)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with EntropyProbe(model) as probe, torch.no_grad():
        for layer in model.model.layers:
            layer(hidden, position_embeddings=rotary)
            layer(hidden, position_embeddings=rotary)
    assert len(probe.layers) == 2
    assert (probe.rows() == 24).all()


def test_two_applications_of_one_softmax_count_once():
    config = DiffLlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=2)
    for implementation in ("sdpa", "eager"):
        model, batch = randomized(AutoModelForCausalLM.from_config(config)), batch_of("left")
        model.set_attn_implementation(implementation)
        with EntropyProbe(model) as probe, torch.no_grad():
            model(**batch)
        assert probe.layers == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        assert (probe.rows() == int(batch["attention_mask"].sum())).all()
        np.testing.assert_allclose(probe.per_head().numpy(), expected_of(model, batch)["per_head"], rtol=0, atol=2e-5)


def test_a_recorder_has_the_same_rows():
    model, batch = albert(), batch_of("none")
    with EntropyRecorder(model) as recorded:
        model(**batch)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch)
    assert recorded.per_head().shape == (2, 3, 4)
    torch.testing.assert_close(recorded.per_head().mean(0).detach(), probe.per_head(), rtol=0, atol=1e-6)
    assert recorded.per_head().requires_grad


def test_a_recorder_of_two_passes_refuses():
    model, batch = build("llama"), batch_of("none")
    with EntropyRecorder(model) as recorded:
        model(**batch)
        model(**batch)
    with pytest.raises(InputError, match="more than one forward pass"):
        recorded.per_head()


def test_tokens_that_assisted_decoding_rejects_are_counted():
    model, draft = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ids = batch_of("none", n_token=6)["input_ids"][:1]
    seen = []

    def note(module, args, options):
        seen.append(options["input_ids"].shape[1])

    with EntropyProbe(model) as probe, torch.no_grad():
        handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
        tokens = model.generate(input_ids=ids, assistant_model=draft, max_new_tokens=12, do_sample=False)
        handle.remove()
    assert probe.rows()[0, 0] == sum(seen)
    rejected = sum(seen) - (tokens.shape[1] - 1)
    assert rejected > 0
    assert 0 < probe.taken_back <= rejected + 1
    with EntropyProbe(model) as plain, torch.no_grad():
        model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert plain.taken_back == 0
    probe.reset()
    assert probe.taken_back == 0


def failing_at(model, layer):
    def fail(*_):
        raise RuntimeError("on purpose")

    return model.model.layers[layer].self_attn.q_proj.register_forward_pre_hook(fail)


def test_a_pass_that_ends_in_an_exception_is_counted():
    model, batch = build("llama"), batch_of("none")
    handle = failing_at(model, 1)
    with EntropyProbe(model) as probe, torch.no_grad():
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**batch)
        handle.remove()
        model(**batch)
    assert probe.interrupted == 1
    assert probe.rows()[:, 0].tolist() == [64, 32]
    assert probe.unreadable == {}
    np.testing.assert_allclose(probe.per_head().numpy(), expected_of(model, batch)["per_head"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_retry_does_not_inherit_the_length_of_a_cache(fresh):
    """Whether the retry has a cache or not, positions are those of its own tokens."""
    model, batch = build("llama"), batch_of("none", n_token=12)
    ids = batch["input_ids"]
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=prefix)
    with EntropyProbe(model) as probe, torch.no_grad():
        handle = failing_at(model, 1)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(input_ids=ids[:, 8:], past_key_values=copy.deepcopy(prefix))
        handle.remove()
        probe.reset()
        if fresh:
            model(input_ids=ids, use_cache=False)
        else:
            model(input_ids=ids[:, 8:], past_key_values=copy.deepcopy(prefix))
    with EntropyProbe(model) as whole, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    start = 0 if fresh else 8
    found, expected = probe.per_position()[..., start:], whole.per_position()[..., start:]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
