"""The probe against the attention weights that the models themselves return in eager mode, entropy in float64 NumPy."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.probes import EntropyProbe

from .small_models import ARCHITECTURES, N_HEAD, batch_of, build

PADDINGS = ["none", "left", "right"]


def eager_twin(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin.eval()


def entropies_of(attentions):
    """Float64 [n_layer, batch, n_head, T] nats of materialised weights."""
    p = np.stack([each.double().numpy() for each in attentions])
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1), p


def expected_of(model, batch):
    """Own mean entropies per head and position, their bound and sink share, over the tokens that are no padding."""
    with torch.no_grad():
        entropy, p = entropies_of(eager_twin(model)(**batch, output_attentions=True).attentions)
    real = batch["attention_mask"].numpy().astype(bool)
    weight = real[None, :, None, :]
    rows = real.sum()
    first = real.argmax(-1)
    sink = np.take_along_axis(p, first[None, :, None, None, None], -1)[..., 0]
    visible = (p > 0).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_position = (entropy * weight).sum(1) / real.sum(0)
        bound = np.where(weight, np.log(visible), 0.0).sum((1, 3)) / rows
    return {
        "per_head": (entropy * weight).sum((1, 3)) / rows,
        "per_position": by_position,
        "maximum": bound,
        "sink_share": (sink * weight).sum((1, 3)) / rows,
        "rows": rows,
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_six_architectures_against_their_own_eager_attention(name, padding, implementation):
    model = build(name)
    model.set_attn_implementation(implementation)
    batch = batch_of(padding)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch)
    expected = expected_of(model, batch)
    assert probe.unreadable == {}
    assert len(probe.layers) == model.config.num_hidden_layers
    assert probe.per_head().dtype == torch.float32
    assert (probe.rows() == int(expected["rows"])).all()
    assert (probe.nan_rows() == 0).all()
    for result in ("per_head", "per_position", "maximum", "sink_share"):
        np.testing.assert_allclose(
            getattr(probe, result)().numpy(), expected[result], rtol=0, atol=2e-5, err_msg=result
        )
    normalized = expected["per_head"] / expected["maximum"]
    np.testing.assert_allclose(probe.normalized().numpy(), normalized, rtol=0, atol=2e-5)


def test_statistics_accumulate_over_batches_of_different_lengths():
    model = build("llama")
    batches = [batch_of("left", n_token=20, seed=1), batch_of("right", n_token=9, seed=2)]
    probe = EntropyProbe(model)
    for batch in batches:
        with probe, torch.no_grad():
            model(**batch)
    parts = [expected_of(model, batch) for batch in batches]
    rows = sum(part["rows"] for part in parts)
    mean = sum(part["per_head"] * part["rows"] for part in parts) / rows
    np.testing.assert_allclose(probe.per_head().numpy(), mean, rtol=0, atol=2e-5)
    assert (probe.rows() == int(rows)).all()
    assert probe.per_position().shape == (2, N_HEAD, 20)
    probe.reset()
    assert set(probe.unreadable) == set(probe.layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_with_a_cache_gives_what_one_pass_over_the_text_gives(name):
    model = build(name)
    batch = batch_of("left", n_token=7)
    with EntropyProbe(model) as probe, torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=0)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 11, dtype=torch.int64)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = {"input_ids": tokens[:, :-1], "attention_mask": mask, "position_ids": positions}
    expected = expected_of(model, whole)
    np.testing.assert_allclose(probe.per_head().numpy(), expected["per_head"], rtol=0, atol=3e-5)
    np.testing.assert_allclose(probe.per_position().numpy(), expected["per_position"], rtol=0, atol=3e-5)
    assert (probe.rows() == int(mask.sum())).all()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_static_cache_in_two_calls(padding):
    model = build("llama")
    batch = batch_of(padding, n_token=10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with EntropyProbe(model) as probe, torch.no_grad():
        for start, stop in ((0, 6), (6, 10)):
            model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                position_ids=torch.arange(start, stop)[None],
                past_key_values=cache,
            )
    with torch.no_grad():
        twin = eager_twin(model)
        output = twin(**batch, position_ids=torch.arange(10)[None], output_attentions=True)
    entropy, _ = entropies_of(output.attentions)
    real = batch["attention_mask"].numpy()[None, :, None, :]
    expected = (entropy * real).sum((1, 3)) / real.sum()
    np.testing.assert_allclose(probe.per_head().numpy(), expected, rtol=0, atol=2e-5)


def test_cropped_sliding_cache_keeps_absolute_positions():
    model = build("mistral")
    assert model.config.sliding_window == 6
    batch = batch_of("none", n_token=4)
    with EntropyProbe(model) as probe, torch.no_grad():
        model.generate(**batch, max_new_tokens=15, do_sample=False, pad_token_id=0)
    assert probe.per_position().shape == (2, N_HEAD, 18)
    assert (probe.rows() == 2 * 18).all()
    expected = np.log(np.minimum(np.arange(1, 19), 6)).mean()
    np.testing.assert_allclose(probe.maximum().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_gradients_and_random_numbers_are_the_same_bit_for_bit(name, implementation):
    model = build(name, dropout=0.1).train()
    model.set_attn_implementation(implementation)
    batch = batch_of("right")

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        return [output.logits.detach(), *gradients, torch.rand(3)]

    bare = step()
    with EntropyProbe(model, count_nonfinite=True):
        probed = step()
    assert all(torch.equal(left, right) for left, right in zip(bare, probed, strict=True))


def test_a_model_that_branches_on_eager_is_not_changed():
    model = build("gpt2", reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    batch = batch_of("none")
    with EntropyProbe(model) as probe, torch.no_grad():
        probed = model(**batch).logits
    assert torch.equal(probed, model(**batch).logits)
    # this way of gpt2's computes its softmax itself
    assert probe.unreadable == {}
    np.testing.assert_allclose(probe.per_head().numpy(), expected_of(model, batch)["per_head"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_under_gradient_checkpointing_counts_once(use_reentrant):
    model = build("llama").train()
    batch = batch_of("none")

    def step():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [each.grad.clone() for each in model.parameters()]

    expected = step()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    with EntropyProbe(model) as probe:
        gradients = step()
    assert (probe.rows() == batch["input_ids"].numel()).all()
    np.testing.assert_allclose(probe.per_head().numpy(), expected_of(model, batch)["per_head"], atol=2e-5)
    for left, right in zip(expected, gradients, strict=True):
        torch.testing.assert_close(left, right)


def probe_of_weights(model, batch):
    with EntropyProbe(model) as probe, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attentions = model(**batch, output_attentions=True).attentions
    return probe, attentions


@pytest.mark.parametrize("block_elements", [1, 2**22])
def test_weights_in_float32_are_read_as_the_model_has_attended_with_them(monkeypatch, block_elements):
    """Under autocast they are not those of the exact queries and keys: its scores are rounded."""
    monkeypatch.setattr("normfree.entropy.reference.BLOCK_ELEMENTS", block_elements)
    model = NormfreeForCausalLM(NormfreeConfig(vocab_size=50, n_layer=2, n_head=4, n_embd=32, initializer_range=0.5))
    model.eval().set_attn_implementation("eager")
    probe, attentions = probe_of_weights(model, batch_of("none"))
    assert {each.dtype for each in attentions} == {torch.float32}
    entropy, p = entropies_of(attentions)
    np.testing.assert_allclose(probe.per_head().numpy(), entropy.mean((1, 3)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(probe.per_position().numpy(), entropy.mean(1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(probe.sink_share().numpy(), p[..., 0].mean((1, 3)), rtol=0, atol=1e-6)


def test_a_query_whose_weights_are_nan_is_counted():
    model = build("llama")
    model.set_attn_implementation("eager")
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, inputs, output: output.index_fill(1, torch.tensor([3]), torch.inf)
    )
    with EntropyProbe(model) as probe, torch.no_grad():
        attentions = model(**batch_of("none"), output_attentions=True).attentions
    hook.remove()
    expected = torch.stack([each.isnan().any(-1).sum((0, 2)) for each in attentions])
    assert expected[1].sum() > 0
    assert torch.equal(probe.nan_rows(), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_after_dropout_are_not_taken_for_the_softmax(name):
    model = build(name, dropout=0.5).train()
    model.set_attn_implementation("eager")
    batch = batch_of("none")
    torch.manual_seed(0)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(**batch)
    torch.manual_seed(0)
    with EntropyProbe(model, backend="reference") as expected, torch.no_grad():
        model(**batch)
    np.testing.assert_allclose(probe.per_head().numpy(), expected.per_head().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_is_looked_at_again_when_it_has_changed(inference):
    """A model that writes to the mask between its layers."""
    model = build("llama")
    model.set_attn_implementation("eager")
    hidden = torch.finfo(torch.float32).min

    def hide(module, inputs, options):
        options["attention_mask"].copy_(torch.full((16, 16), hidden).triu(1).masked_fill(torch.eye(16) == 0, hidden))

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    with EntropyProbe(model) as probe, torch.inference_mode(inference):
        model(**batch_of("right"))
    hook.remove()
    assert (probe.maximum()[0] > 1).all()
    assert (probe.maximum()[1] == 0).all()


def test_autocast_entropy_is_that_of_the_rounded_queries_and_keys():
    model = build("llama")
    batch = batch_of("none")
    with EntropyProbe(model) as probe, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**batch)
    exact = expected_of(model, batch)["per_head"]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        attentions = eager_twin(model)(**batch, output_attentions=True).attentions
    rounded, _ = entropies_of(attentions)
    assert np.abs(probe.per_head().numpy() - rounded.mean((1, 3))).max() < 0.02
    assert np.abs(probe.per_head().numpy() - exact).max() < 0.1


def test_nan_is_counted_and_spoils_the_heads_it_is_in():
    model = build("llama")
    n_dim = model.config.hidden_size // N_HEAD
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[n_dim : 2 * n_dim] = math.nan
    batch = batch_of("right")
    with EntropyProbe(model, count_nonfinite=True) as probe, torch.no_grad():
        model(**batch)
    n_real = int(batch["attention_mask"].sum())
    expected = torch.zeros(2, N_HEAD, dtype=torch.int64)
    expected[1, 1] = n_real
    assert torch.equal(probe.nan_rows(), expected)
    assert (probe.rows() == n_real).all()
    assert torch.equal(probe.per_head().isnan(), expected > 0)
    assert torch.equal(probe.per_position().isnan().all(-1), expected > 0)
    assert torch.equal(probe.sink_share().isnan(), expected > 0)
    nan, inf = probe.nonfinite()
    assert torch.equal(nan > 0, expected > 0)
    assert (inf == 0).all()


def test_float16_overflow_is_counted():
    model = build("gpt2").half()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :64] *= 400
    batch = batch_of("none")
    with EntropyProbe(model, count_nonfinite=True) as probe, torch.no_grad():
        model(**batch)
    _, inf = probe.nonfinite()
    assert (inf[0] > 0).all()
    assert (inf[1] == 0).all() or probe.per_head()[1].isnan().any()


def test_float16_overflow_is_counted_where_kernels_keep_float32():
    config = NormfreeConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=16, n_positions=16)
    model = NormfreeForCausalLM(config)
    with torch.no_grad():
        for projection in (model.model.blocks[0].attention.q_proj, model.model.blocks[0].attention.k_proj):
            projection.weight[:8] *= 1e4  # of the first head
    counted = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        half = torch.autocast("cpu", torch.float16)
        with EntropyProbe(model, count_nonfinite=True) as probe, half, torch.no_grad():
            assert model(torch.arange(16)[None]).logits.isfinite().all() == (implementation == "sdpa")
        counted.append(probe.nonfinite()[1].tolist())
    assert counted[0] == counted[1]
    ((first, second),) = counted[0]
    assert (first > 0, second) == (True, 0)


def test_attention_functions_of_unknown_conventions_are_named():
    def own_attention(module, query, key, value, attention_mask, **kwargs):
        return value.transpose(1, 2), None

    AttentionInterface.register("own_attention", own_attention)
    try:
        model = build("gpt2")
        model.set_attn_implementation("own_attention")
        with EntropyProbe(model) as probe, torch.no_grad():
            model(**batch_of("none"))
    finally:
        del AttentionInterface._global_mapping["own_attention"]
    assert all("own_attention are not known" in reason for reason in probe.unreadable.values())


def test_everything_is_restored_after_an_exception():
    model = build("llama")
    original = AttentionInterface.get_interface
    probe = EntropyProbe(model)

    def fail(*_):
        assert AttentionInterface.get_interface is not original
        raise RuntimeError("on purpose")

    failing = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"), probe:
        model(**batch_of("none"))
    failing.remove()
    assert AttentionInterface.get_interface is original
    assert not any(module._forward_pre_hooks for module in model.modules())
    with probe, torch.no_grad():
        model(**batch_of("none"))
    assert probe.unreadable == {}


def test_probes_of_two_models_may_end_in_any_order():
    first, second = build("llama"), build("gpt2")
    original = AttentionInterface.get_interface
    outer, inner = EntropyProbe(first), EntropyProbe(second)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with torch.no_grad():
        first(**batch_of("none"))
        second(**batch_of("none"))
    inner.__exit__(None, None, None)
    assert AttentionInterface.get_interface is original
    assert inner.unreadable == {}
    assert set(outer.unreadable) == set(outer.layers)
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS


def test_bad_use_is_named():
    model = build("gpt2")
    with pytest.raises(InputError, match="unknown entropy backend"):
        EntropyProbe(model, backend="cudnn")
    with pytest.raises(InputError, match="no attention module"):
        EntropyProbe(nn.Linear(2, 2))
    probe = EntropyProbe(model)
    with probe, pytest.raises(InputError, match="already active"):
        probe.__enter__()
    with pytest.raises(InputError, match="count_nonfinite=True"):
        probe.nonfinite()
    with pytest.raises(InputError, match="no attention layer of the model has been read"):
        probe.per_head()
