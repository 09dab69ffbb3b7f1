"""Normfree's numbers on two real models against the models themselves, in float64 where that is computed again."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from normfree import EntropyProbe, NormfreeConfig, NormfreeForCausalLM, from_hf, remove_norms, to_stock
from normfree.interpret import (
    attention_sinks,
    check_quantization,
    measure_depth,
    prune_layers,
    quantization_cost,
    residual_std_by_position,
)
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.removal.midway import Midway
from normfree.removal.parts import QKNorms, parts_to_remove
from normfree.removal.schedule import automatic_schedule
from normfree.training.evaluation import evaluation_losses
from tests.real.conftest import eager_attentions

pytestmark = pytest.mark.real

BOTH = pytest.mark.parametrize("name", ["smollm2", "gemma3"])
SHAPE = {"smollm2": (30, 9, 576, 49152), "gemma3": (18, 4, 640, 262144)}


@BOTH
def test_a_gguf_file_is_the_model_that_it_says(name, loaded):
    model = loaded(name).model
    config = model.config
    sizes = config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.vocab_size
    assert sizes == SHAPE[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize(
    ("name", "bos", "low", "high"),
    [("smollm2", None, 1.9, 3.0), ("gemma3", None, 1.6, 2.8), ("gemma3", False, 3.0, 4.3)],
)
def test_losses_are_those_of_a_trained_model_that_begins_as_it_should(name, bos, low, high, loaded, sequences):
    found = sequences(name, 8, 256, bos)
    begins = found.tokens[:, 0] == (loaded(name).model.config.bos_token_id if name == "gemma3" else -1)
    assert begins.all() if name == "gemma3" and bos is None else not begins.any()
    assert low < evaluation_losses(loaded(name).model, found.tokens, 4).mean() < high


@BOTH
def test_the_probe_agrees_with_eager_attentions(name, loaded, sequences):
    model, tokens = loaded(name).model, sequences(name, 2, 96).tokens
    p = np.stack([each.double().numpy() for each in eager_attentions(model, tokens)])
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    assert not probe.unreadable
    np.testing.assert_allclose(probe.per_head().numpy(), entropy.mean(axis=(1, 3)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(probe.sink_share().numpy(), p[..., 0].mean(axis=(1, 3)), rtol=0, atol=1e-5)


@BOTH
def test_from_hf_gives_the_same_logits(name, loaded, sequences):
    model, tokens = loaded(name).model, sequences(name, 2, 64).tokens
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        found = from_hf(model)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@BOTH
def test_depth_agrees_with_hidden_states_and_a_shorter_pass(name, loaded, sequences):
    model, tokens = loaded(name).model, sequences(name, 2, 32).tokens
    found = measure_depth(model, tokens, n_probe=2)
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    streams = torch.stack(output.hidden_states[:-1]).double()
    variance = streams.var(dim=-1, correction=0).mean(dim=(1, 2))
    rows = found.residual_variance.query("tokens == 'all'")["residual_variance"].to_numpy()
    np.testing.assert_allclose(rows[: len(streams)], variance, rtol=1e-5)
    (row,) = found.summary.to_dict("records")
    losses = float(cross_entropy(output.logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten()))
    assert row["loss_nats"] == pytest.approx(losses, abs=1e-5)
    layer = len(streams) // 2
    block = list(decoder_blocks(model).values())[layer]
    with block.register_forward_hook(lambda module, inputs, output: inputs[0]), torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    increase = float(cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())) - losses
    assert found.skipped_layers["loss_increase_nats"][layer] == pytest.approx(increase, abs=2e-5)
    assert row["variance_growth_is_distinct"]
    assert row["effective_depth_share"] < 0.8


@BOTH
def test_the_first_token_is_massive_and_a_sink(name, loaded, sequences):
    model, tokens = loaded(name).model, sequences(name, 2, 64).tokens
    stds = residual_std_by_position(model, tokens).pivot(index="layer", columns="position", values="residual_std")
    middle = stds.loc[len(stds) * 2 // 3]
    assert middle[0] > 5 * middle[1:].median()
    assert attention_sinks(model, tokens)["is_sink"].mean() > 0.3


@BOTH
def test_a_pruned_model_is_the_model_with_its_layers_skipped(name, loaded, sequences):
    model, tokens = loaded(name).model, sequences(name, 2, 32).tokens
    layer = len(decoder_blocks(model)) - 3
    block = list(decoder_blocks(model).values())[layer]
    with block.register_forward_hook(lambda module, inputs, output: inputs[0]), torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        found = prune_layers(model, [layer])(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@BOTH
@torch.no_grad()
def test_norms_become_constants_that_fold_away(name, loaded, sequences):
    """Of Gemma 3 four norms a block and those of queries and keys; constants of the largest std keep logits finite."""
    hf, tokens = loaded(name).model, sequences(name, 1, 32).tokens
    model = from_hf(hf)
    qk_norms: QKNorms = "keep" if model.config.qk_norm == "none" else "remove"
    parts = parts_to_remove(model.config, qk_norms)
    schedule = automatic_schedule(model.config.n_layer, 300, parts, qk_norms)
    schedule = schedule.model_copy(update={"std_statistic": 1.0, "special_tokens": "published"})
    removals = schedule.removals(model.config)
    midway = Midway(model, schedule)
    expected = hf(input_ids=tokens, use_cache=False).logits
    found = model(tokens, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with torch.enable_grad():  # sets the running stds
        model.train()(tokens, use_cache=False)
    model.eval()
    for removal in removals:
        midway.apply(removal)
    midway.finish()
    constant = NormfreeForCausalLM(
        NormfreeConfig(**{each: getattr(model.config, each) for each in NormfreeConfig.option_names()})
    ).eval()
    constant.load_state_dict(model.state_dict())
    expected = constant(tokens, use_cache=False).logits
    for export in (remove_norms, to_stock):
        torch.testing.assert_close(export(constant)(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(to_stock(constant)) is type(hf)


@BOTH
def test_int8_weights_cost_little(name, loaded, sequences):
    check_quantization(torch.device("cpu"))
    found = quantization_cost(loaded(name).model, sequences(name, 2, 64).tokens).set_index("precision")
    assert found["increase_percent"]["int8_weights"] < 5
    assert found["eval_loss"].is_monotonic_increasing or abs(found["increase_percent"]).max() < 5
